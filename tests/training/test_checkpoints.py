"""The same run is the same data and weights, whatever their paths; the log says what is another."""

import hashlib
import json
import shutil

import pytest
import torch
from builders import join, pair, random_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ubmoe.bitune import training as instruct
from ubmoe.bitune.model import attach
from ubmoe.config import BiSection, BituneSection, MoeSection, StageSection, UserError
from ubmoe.data.chats import Chat
from ubmoe.data.prompts import Example
from ubmoe.encoder import contrastive, mntp
from ubmoe.encoder.sentence_encoder import as_encoder
from ubmoe.moe import router_training
from ubmoe.training.checkpoints import StageRun

STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
SENTENCES = ("The dog sleeps.", "A cook burned the pie.", "Anna lives there.", "It rains today.")
OTHERS = ("The cat sleeps.", "A cook burned the pie.", "Anna lives there.", "It rains today.")


def moved(model, name):
    """The model with one row of one of its matrices changed, as a patched checkpoint has it."""
    with torch.no_grad():
        dict(model.named_parameters())[name][3] += 0.01
    return model


def stage_of(objective, tokenizer, path, directory, resume, texts, patched):
    path.write_text("\n".join(texts))
    longest = 8 if objective == "mntp" else 64
    more = {"objective": objective, "dataset": str(path), "max_tokens": longest, "lora": None}
    stage = StageSection(**STEPS | more)
    model = random_model("qwen2", vocab_size=len(tokenizer))
    model.name_or_path = str(path)
    if patched:
        moved(model, "model.layers.1.self_attn.q_proj.weight")
    work = StageRun(directory, 0, resume)
    if objective == "mntp":
        chunks = mntp.chunked(stage, tokenizer)
        report = mntp.train_stage(model, tokenizer, stage, chunks, work)
    else:
        encoder = as_encoder(model, tokenizer, BiSection())
        rows, _ = contrastive.read_dataset(stage, tokenizer)
        report = contrastive.train_stage(encoder, model, stage, rows, work)
    return report["log"]


def routers_of(tokenizer, path, directory, resume, texts, patched):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    chats = [Chat(f"{path}:1", ids, [True] * len(ids), ["answer"] * len(ids)) for ids in rows]
    uni, bi = pair(vocab_size=len(tokenizer))
    if patched:
        moved(bi, "model.layers.1.mlp.up_proj.weight")
    return router_training.train(
        join(uni, bi), MoeSection(**STEPS), chats, StageRun(directory, 0, resume)
    )


def bitune_of(tokenizer, path, directory, resume, texts, patched):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    examples = [Example(ids[:2], ids[2:]) for ids in rows]
    model = random_model("qwen2", vocab_size=len(tokenizer))
    if patched:
        moved(model, "model.layers.1.self_attn.q_proj.weight")
    keys = BituneSection(**STEPS)
    return instruct.train(attach(model, keys, 0), keys, examples, StageRun(directory, 0, resume))


RUNS = {
    "simcse": lambda *given: stage_of("simcse", *given),
    "mntp": lambda *given: stage_of("mntp", *given),
    "routers": routers_of,
    "bitune": bitune_of,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_identified_by_what_it_read_and_not_by_where(kind, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO", "ubmoe")

    def run(resume, name="a.txt", texts=SENTENCES, patched=False):
        caplog.clear()
        path = tmp_path / name
        log = RUNS[kind](tokenizer, path, tmp_path / "work", resume, texts, patched)
        return [row["loss"] for row in log if "loss" in row], caplog.text

    first, _ = run(False)
    again, said = run(True, "elsewhere.txt")
    assert again == first and "trained to the end before" in said
    other, said = run(True, texts=OTHERS)  # as many rows, under the same path
    assert other != first and "work: of another run (other data); starting afresh" in said
    other, said = run(True, texts=OTHERS, patched=True)
    assert "work: of another run (other weights); starting afresh" in said
    assert run(False, texts=OTHERS, patched=True)[0] == other
    assert "trained to the end before" in run(True, texts=OTHERS, patched=True)[1]
    assert "(other data, weights)" in run(True)[1]


def test_half_a_mark_is_none(tokenizer, tmp_path):
    given = (tokenizer, tmp_path / "a.txt", tmp_path / "work")
    first = bitune_of(*given, False, SENTENCES, False)
    mark = tmp_path / "work" / "stage.json"
    mark.write_text(mark.read_text()[:50])
    again = bitune_of(*given, True, SENTENCES, False)
    assert [row.get("loss") for row in again] == [row.get("loss") for row in first]
    assert mark.read_text().endswith("}")


# --- what a checkpoint is believed ----------------------------------------------------------------


def tuned(tokenizer, directory, resume=False, seed=0):
    """The FFN's weights after a few steps of a random model, saved at each."""
    keys = {"max_steps": 4, "save_steps": 1, "save_total_limit": 3, "train": ["ffn"]}
    keys |= {"bf16": False}  # a module's fixture is made before conftest.py switches it off
    (directory.parent / "a.txt").write_text("\n".join(SENTENCES))
    more = {"objective": "mntp", "dataset": f"{directory.parent}/a.txt", "max_tokens": 8}
    stage = StageSection(**STEPS | keys | more, lora=None)
    model = random_model("qwen2", vocab_size=len(tokenizer))
    chunks = mntp.chunked(stage, tokenizer)
    mntp.train_stage(model, tokenizer, stage, chunks, StageRun(directory, seed, resume))
    return {name: value.clone() for name, value in model.named_parameters() if ".mlp." in name}


def same(found, expected):
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def interrupted(tokenizer, tmp_path_factory):
    """The weights of an undisturbed run, and the folder of one that ended after its third step."""
    folder = tmp_path_factory.mktemp("interrupted")
    expected = tuned(tokenizer, folder / "work")
    shutil.rmtree(folder / "work" / "checkpoint-4")
    assert sorted(path.name for path in (folder / "work").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    return expected, folder / "work"


def weights(change):
    def damage(checkpoint):
        path = checkpoint / "trainable.safetensors"
        save_file({name: change(value) for name, value in load_file(path).items()}, path)

    return damage


def stored(name, change):
    def damage(checkpoint):
        found = torch.load(checkpoint / name, weights_only=False)
        change(found)
        torch.save(found, checkpoint / name)

    return damage


def json_of(name, **changes):
    def damage(checkpoint):
        found = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(found | changes))

    return damage


def text_of(name, text):
    return lambda checkpoint: (checkpoint / name).write_text(text)


def removed(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def other_moments(found):
    found["state"][0]["exp_avg"] = torch.zeros(3)


DAMAGES = {
    **{f"no {name}": removed(name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")},
    **{f"no {name}": removed(name) for name in ("trainable.safetensors", "trainer_state.json")},
    "one number": weights(lambda value: value.flatten()[:1]),
    "another shape": weights(lambda value: value.T.contiguous()),
    "integers": weights(lambda value: value.int()),
    "half floats": weights(lambda value: value.half()),
    "other numbers": weights(lambda value: value + 1),
    "moments of another shape": stored("optimizer.pt", other_moments),
    "no moments": stored("optimizer.pt", lambda found: found["state"].clear()),
    "other groups": stored("optimizer.pt", lambda found: found["param_groups"].pop()),
    "an empty schedule": stored("scheduler.pt", lambda found: found.clear()),
    "a schedule of words": stored("scheduler.pt", lambda found: found.update(last_epoch="x")),
    "a schedule before it": stored("scheduler.pt", lambda found: found.update(last_epoch=-5)),
    "a far schedule": stored("scheduler.pt", lambda found: found.update(last_epoch=10**9)),
    "other rates": stored("scheduler.pt", lambda found: found.update(base_lrs=[9.0])),
    "another rate": stored("optimizer.pt", lambda found: found["param_groups"][0].update(lr=5.0)),
    "other betas": stored(
        "optimizer.pt", lambda found: found["param_groups"][0].update(betas=(0.0, 0.0))
    ),
    "short random state": stored(
        "rng_state.pth", lambda found: found.update(cpu=found["cpu"][:5].clone())
    ),
    "a key of another version": json_of("trainer_state.json", another=1),
    "a step with a point": json_of("trainer_state.json", global_step=3.0),
    "an end of another": json_of("trainer_state.json", max_steps=3),
    "no random state": stored("rng_state.pth", lambda found: found.clear()),
    "a far step": json_of("trainer_state.json", global_step=10**9),
    "a step before": json_of("trainer_state.json", global_step=-5),
    "a step of another": json_of("trainer_state.json", global_step=2),
    "a list": text_of("trainer_state.json", "[]"),
    "null": text_of("trainer_state.json", "null"),
    "brackets": text_of("trainer_state.json", "[" * 100_000),
    "half": text_of("optimizer.pt", "PK"),
}
OF_MANIFEST = {
    "no manifest": removed("manifest.json"),  # as an earlier version left it
    "a manifest that is a list": text_of("manifest.json", "[]"),
    "a manifest of no files": json_of("manifest.json", files={}),
    "a manifest of other processes": json_of("manifest.json", processes=10**9),
    "a manifest of paths": json_of("manifest.json", files={"../../a": "0"}),
}


def sealed(damage):
    """The damage, with a manifest made to fit."""

    def both(checkpoint):
        damage(checkpoint)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name in list(manifest["files"]):
            path = checkpoint / name
            if path.exists():
                manifest["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                del manifest["files"][name]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return both


@pytest.mark.parametrize("kind", [*DAMAGES, *OF_MANIFEST])
def test_a_damaged_checkpoint_is_said_and_the_run_goes_on_from_the_one_before(
    kind, interrupted, tokenizer, tmp_path, caplog
):
    caplog.set_level("INFO", "ubmoe")
    expected, work = interrupted
    shutil.copytree(work, tmp_path / "work")
    (DAMAGES | OF_MANIFEST)[kind](tmp_path / "work" / "checkpoint-3")
    assert same(tuned(tokenizer, tmp_path / "work", resume=True), expected)
    said = [line for line in caplog.messages if "checkpoint-3" in line]
    assert len(said) == 1 and said[0].endswith("; not used")
    assert f"{tmp_path}/work/checkpoint-2: going on from it" in caplog.messages


SURE = ("other numbers",)  # of which nothing but the digest says that they are not the run's


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind not in SURE])
def test_a_manifest_that_was_made_to_fit_does_not_help(kind, interrupted, tokenizer, tmp_path):
    expected, work = interrupted
    shutil.copytree(work, tmp_path / "work")
    for number in (2, 3):
        sealed(DAMAGES[kind])(tmp_path / "work" / f"checkpoint-{number}")
    try:
        assert same(tuned(tokenizer, tmp_path / "work", resume=True), expected)
    except UserError as error:
        assert "checkpoint-" in str(error)


def test_with_no_whole_checkpoint_a_run_starts_afresh(interrupted, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO", "ubmoe")
    expected, work = interrupted
    shutil.copytree(work, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "checkpoint-2")
    removed("optimizer.pt")(tmp_path / "work" / "checkpoint-3")
    assert same(tuned(tokenizer, tmp_path / "work", resume=True), expected)
    assert f"{tmp_path}/work: no whole checkpoint of this run; starting afresh" in caplog.messages
    assert {path.name for path in (tmp_path / "work").glob("*-*")} == {
        f"checkpoint-{number}" for number in (2, 3, 4)
    }


def test_a_checkpoint_of_another_place_is_not_this_runs(interrupted, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO", "ubmoe")
    expected, work = interrupted
    shutil.copytree(work, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "checkpoint-3")
    (tmp_path / "work" / "checkpoint-2").rename(tmp_path / "work" / "checkpoint-3")
    assert same(tuned(tokenizer, tmp_path / "work", resume=True), expected)
    (tmp_path / "other").mkdir()
    tuned(tokenizer, tmp_path / "other" / "work", seed=1)
    shutil.rmtree(tmp_path / "work" / "checkpoint-4")
    shutil.rmtree(tmp_path / "work" / "checkpoint-3")
    shutil.copytree(tmp_path / "other" / "work" / "checkpoint-3", tmp_path / "work/checkpoint-3")
    assert same(tuned(tokenizer, tmp_path / "work", resume=True), expected)
    assert caplog.text.count("checkpoint-3: of another run or step; not used") == 2


def test_what_a_user_keeps_beside_checkpoints_stays(interrupted, tokenizer, tmp_path, caplog):
    expected, work = interrupted
    shutil.copytree(work, tmp_path / "work")
    for name in ("checkpoint-mine", "checkpoint-abc", "checkpoint-\u0663"):
        (tmp_path / "work" / name).mkdir()
        (tmp_path / "work" / name / "a").write_text(name)
    shutil.copytree(work / "checkpoint-2", tmp_path / "work" / "checkpoint-best")
    (tmp_path / "work" / "checkpoint-2" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"checkpoint-2/notes.txt is in the way"):
        tuned(tokenizer, tmp_path / "work", resume=True)
    (tmp_path / "work" / "checkpoint-2" / "notes.txt").unlink()
    assert same(tuned(tokenizer, tmp_path / "work", resume=True), expected)
    tuned(tokenizer, tmp_path / "work", seed=1)  # another run removes the first one's
    for name in ("checkpoint-mine", "checkpoint-abc", "checkpoint-\u0663"):
        assert (tmp_path / "work" / name / "a").read_text() == name
    assert (tmp_path / "work" / "checkpoint-best" / "optimizer.pt").exists()


def test_a_link_in_a_checkpoint_is_not_followed(interrupted, tokenizer, tmp_path):
    shutil.copytree(interrupted[1], tmp_path / "work")
    path = tmp_path / "work" / "checkpoint-3" / "optimizer.pt"
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError, match=r"checkpoint-3/optimizer.pt is in the way"):
        tuned(tokenizer, tmp_path / "work", resume=True)
    assert path.is_symlink() and (tmp_path / "elsewhere.pt").stat().st_size > 1000


@pytest.mark.parametrize("name", ["checkpoint-3", "stage.json"])
def test_what_is_called_like_ours_and_is_not_is_refused(tokenizer, tmp_path, name):
    (tmp_path / "work" / name).mkdir(parents=True)
    (tmp_path / "work" / name / "a").write_text("mine")
    with pytest.raises(UserError, match=f"{name} is in the way, and not known to be made by this"):
        tuned(tokenizer, tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").rglob("*")] == [name, "a"]
