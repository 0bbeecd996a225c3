"""The configuration is strict, says everything in one line, and reads back what it writes."""

import json
import subprocess
import sys

import pytest
import yaml
from builders import ROOT

from ubmoe import cli as command
from ubmoe.config import (
    ECHO,
    FORMS,
    Config,
    UserError,
    dump_config,
    help_text,
    keys,
    load_config,
    with_keys,
)


def written(tmp_path, text):
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return path


def problem(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_fill_what_a_file_leaves_out(tmp_path):
    config = load_config(written(tmp_path, "model: {name: gpt2}\ndependence:\n"))
    assert config.model.name == "gpt2"
    assert config.dependence == Config().dependence
    assert config.output_dir == "runs/small"
    assert load_config(written(tmp_path, ""), ["output_dir=''"]).output_dir == "runs/small"


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load_config(written(tmp_path, "")).model.name == "tiny"


def test_overrides_win_and_are_yaml(tmp_path):
    path = written(tmp_path, "dependence: {max_texts: 5}")
    config = load_config(
        path,
        ["dependence.max_texts=null", "dependence.buckets=[0, 8]", "seed=7", "output_dir=a/b=c"],
    )
    assert config.dependence.max_texts is None
    assert (config.dependence.buckets, config.seed, config.output_dir) == ([0, 8], 7, "a/b=c")


def test_list_items_go_by_number(tmp_path):
    config = load_config(written(tmp_path, ""), ["dependence.buckets.1=128"])
    assert config.dependence.buckets == [0, 128, 512, 1024, 2048]
    for item in ("9", "²", "-1"):
        assert "unknown key" in problem(written(tmp_path, ""), f"dependence.buckets.{item}=128")
    assert load_config(written(tmp_path, ""), ["model.name=2020-13-45"]).model.name == "2020-13-45"


def test_a_jinja_string_needs_no_quotes(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = load_config(written(tmp_path, ""), [f"dependence.chat_template={template}"])
    assert config.dependence.chat_template == template


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("dependence.max_text=3", "dependence.max_texts"),
        ("max_texts=3", "dependence.max_texts"),
        ("train=[ffn]", "bi.stages.N.train"),
        ("buckets=3", "dependence.buckets"),
        ("mask_tokens=3", "bi.stages.N.mask_token"),
        ("sts=[]", "evaluation.sts"),
        ("dropouts=0", "bi.stages.N.lora.dropout or bi.stages.N.dropout"),
        ("model.attention_implementation=sdpa", "model.attn_implementation"),
        ("outputdir=x", "output_dir"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(tmp_path, override, nearest):
    key = override.partition("=")[0]
    found = problem(written(tmp_path, ""), override)
    assert found == f"command line: {key}: unknown key; did you mean {nearest}?"


def test_all_problems_of_a_file_are_reported_together(tmp_path):
    path = written(
        tmp_path, "dependence: {max_tokens: 0, flow: both, bukets: [1]}\nmodel: {dtype: half}\n"
    )
    found = problem(path)
    assert found.startswith(str(path))
    for part in (
        "dependence.max_tokens: got 0, expected greater than or equal to 1",
        "dependence.flow: got 'both', expected 'causal' or 'bidirectional'",
        "dependence.bukets: unknown key; did you mean dependence.buckets?",
        "model.dtype: got 'half', expected 'float32', 'auto', 'bfloat16' or 'float16'",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluation.sts", "[STS12, tiny, STS12]"),
        ("evaluation.generation", "[mmlu, mmlu]"),
        ("bitune.generation", "[tiny, tiny]"),
        ("results.seeds", "[0, 1, 0]"),
        ("results.rows", "[ffn, ffn]"),
        ("probing.tasks", "[wic, wic]"),
        ("probing.layers", "[-1, -1]"),
        ("ubmoe.routes", "[half, half]"),
    ],
)
def test_what_stands_twice_in_a_list_is_refused(tmp_path, name, value):
    found = problem(written(tmp_path, ""), f"{name}={value}")
    assert f"{name}: got " in found and "stands there twice; expected each once" in found


@pytest.mark.parametrize(
    "value", ["[512, 256]", "[0, 0]", "[5]", "[]", "[-1, 4]", "[0, 1.5]", "text", "null"]
)
def test_buckets_must_ascend(tmp_path, value):
    assert "dependence.buckets" in problem(written(tmp_path, ""), f"dependence.buckets={value}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {name: a}\nmodel: {name: b}", "key 'model' twice"),
        ("a: [", "not YAML"),
        ("- model", "expected sections"),
        ("model: 3", "model: got 3, expected a section of keys"),
        ("seed: yes", "seed: got True, expected a valid integer"),
        ("seed: 1.0", "seed: got 1.0"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, expected):
    assert expected in problem(written(tmp_path, text))


def test_missing_and_binary_files(tmp_path):
    assert "cannot be read (No such file or directory)" in problem(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in problem(tmp_path / "binary.yaml")


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config(written(tmp_path, ""), ["seed=3", "dependence.max_texts=null"])
    assert load_config(written(tmp_path, dump_config(config))) == config
    assert yaml.safe_load(dump_config(config))["seed"] == 3


def test_two_files_or_a_flag_are_refused():
    for arguments in (["a.yaml", "b.yaml"], ["--verbose"], ["--seed=3"]):
        with pytest.raises(UserError, match="command line"):
            command.parse(arguments)


def test_help_lists_every_key_with_type_default_unit_and_meaning():
    text = help_text("program", "Purpose.")
    for name, field in keys():
        assert f"\n  {name}: " in text
        assert field.description and f"      {field.description}" in text
    assert "dependence.max_tokens: int = 2048 [tokens]" in text


def test_help_answers_without_importing_torch():
    program = (
        "import sys, runpy; sys.argv = ['calculate_dp.py', '--help'];"
        "runpy.run_path('calculate_dp.py', run_name='__main__');"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dependence.flow: causal | bidirectional = causal" in done.stdout


def test_an_override_leaves_unsaid_keys_to_their_objective(tmp_path):
    path = written(tmp_path, "bi: {stages: [{max_steps: 3}]}")
    stage = load_config(path, ["bi.stages.0.objective=mntp", "bi.stages.0.lora.rank=2"]).bi.stages[
        0
    ]
    assert (stage.max_steps, stage.max_tokens, stage.lora.rank) == (3, 512, 2)
    assert load_config(path).bi.stages[0].max_tokens == 128
    whole = load_config(path, ["bi.stages=[{}, {}]", "bi.stages.1.lora.rank=5"]).bi.stages
    assert whole[0].lora is None and whole[1].lora.rank == 5
    assert "bi.stages.2.lora.rank: unknown key" in problem(path, "bi.stages.2.lora.rank=1")
    assert "results.rows.0.keys: unknown key" in problem(path, "results.rows.0.keys=[]")


@pytest.mark.parametrize("keys", ["prompt: null", "prompt: 'a {text} b'", "pooling: last"])
def test_a_prompt_out_of_the_mean_needs_a_mean_and_a_prefix(tmp_path, keys):
    found = problem(written(tmp_path, f"bi: {{prompt_in_mean: false, {keys}}}"))
    assert "bi: prompt_in_mean false is for pooling mean and a prompt that ends in {text}" in found


@pytest.mark.parametrize("module", ["embedding", "all"])
def test_lora_is_refused_with_what_it_cannot_train(tmp_path, module):
    found = problem(written(tmp_path, f"bi: {{stages: [{{train: [{module}], lora: {{}}}}]}}"))
    assert f"bi.stages.0: lora cannot train {module}; expected lora: null" in found


def test_a_form_is_a_prompt_and_its_pooling(tmp_path):
    path = written(tmp_path, "bi: {prompt: null, pooling: weighted_mean}")
    for form, (prompt, pooling) in FORMS.items():
        bi = load_config(path, [f"bi.form={form}"]).bi  # in place of what the file says
        assert (bi.form, bi.prompt, bi.pooling) == (form, prompt, pooling)
    own = load_config(path, ["bi.pooling=mean", "bi.form=eol"])
    assert (own.bi.prompt, own.bi.pooling) == (FORMS["eol"][0], "mean")
    assert load_config(written(tmp_path, dump_config(own))) == own
    assert with_keys(own, ["bi.form=echo"]).bi.pooling == "mean"
    file = written(tmp_path, "bi: {form: eol}")
    assert load_config(file).bi.pooling == "last"
    assert load_config(file, ["bi.form=null"]).bi.pooling == "mean"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["bi.form=eol", "bi.prompt=null"], "form eol has a prompt of its own; expected no other"),
        (["bi.form=echo", "bi.prompt='{text} again'"], "form echo has a prompt of its own"),
        (["bi.form=echo", "bi.prompt_in_mean=false"], "expected prompt_in_mean: true"),
        (["bi.form=both"], "bi.form: got 'both', expected 'plain', 'eol', 'echo' or 'paper'"),
        (["bi.form=[eol]"], "bi.form: got ['eol'], expected 'plain'"),
        ([f"bi.prompt={json.dumps(ECHO)}"], "the prompt reads the text twice; expected form: echo"),
        (["bi.prompt='{text} and {text}'"], "expected {text} once"),
    ],
)
def test_what_contradicts_a_form_is_refused(tmp_path, keys, said):
    assert said in problem(written(tmp_path, ""), *keys)
