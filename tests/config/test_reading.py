"""The configuration is strict, says everything in one line, and reads back what it writes."""

import json
import resource
import subprocess
import sys
from typing import get_args

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
from ubmoe.config.help import SECTIONS


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
        ("max_texts=3", "dependence.max_texts or trajectory.max_texts"),
        ("train=[ffn]", "bi.stages.N.train"),
        ("buckets=3", "dependence.buckets"),
        ("mask_tokens=3", "bi.stages.N.mask_token"),
        ("sts=[]", "trajectory.sts or evaluation.sts"),
        ("dropouts=0", "bi.stages.N.lora.dropout or bi.stages.N.dropout"),
        ("model.attention_implementation=sdpa", "model.attn_implementation"),
        ("outputdir=x", "output_dir"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(tmp_path, override, nearest):
    key = override.partition("=")[0]
    actual = problem(written(tmp_path, ""), override)
    assert actual == f"command line: {key}: unknown key; did you mean {nearest}?"


def test_all_problems_of_a_file_are_reported_together(tmp_path):
    path = written(
        tmp_path, "dependence: {max_tokens: 0, flow: both, bukets: [1]}\nmodel: {dtype: half}\n"
    )
    actual = problem(path)
    assert actual.startswith(str(path))
    for part in (
        "dependence.max_tokens: got 0, expected greater than or equal to 1",
        "dependence.flow: got 'both', expected 'causal' or 'bidirectional'",
        "dependence.bukets: unknown key; did you mean dependence.buckets?",
        "model.dtype: got 'half', expected 'float32', 'auto', 'bfloat16' or 'float16'",
    ):
        assert part in actual


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
    actual = problem(written(tmp_path, ""), f"{name}={value}")
    assert f"{name}: got " in actual and "is listed twice; expected each once" in actual


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
        ("seed: yes", "seed: got true, expected a whole number"),
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
    assert '\n  bitune.template: text | null = "Question: {prompt}\\n\\nAnswer:"\n' in text
    assert "Undefined" not in text and "\n  probing.models.N.name: text\n" in text


def test_a_program_shows_its_own_sections_the_most_used_first():
    text = help_text("train_bi.py", "Purpose.", everything=False)
    assert "\n  bi.prompt: " in text and "\n  probing." not in text and "\n  ubmoe." not in text
    order = [text.index(f"\n  {name}: ") for name in ("output_dir", "model.name", "bi.attention")]
    assert order == sorted(order) and order[-1] < text.index("\n  evaluation.sts: ")
    assert "keys are of other programs: train_bi.py --help all" in text
    sections = {name.partition(".")[0] for name, _ in keys() if "." in name}
    shown = {entry for own in SECTIONS.values() for entry in own}
    assert shown == sections  # each key is shown by some program
    for program in SECTIONS:
        assert len(help_text(program, "", everything=False)) < len(help_text(program, ""))


def test_help_answers_in_under_a_second_of_work():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "train_bi.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "bi.prompt" in done.stdout
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 1, spent  # of the processor: others may use it, too


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
    said = "bi.stages.2.lora.rank: unknown key; the last item of bi.stages is 0"
    assert said in problem(path, "bi.stages.2.lora.rank=1")
    said = "unknown key; bi.stages has no items"
    assert said in problem(written(tmp_path, "bi: {stages: []}"), "bi.stages.0.lora.rank=1")
    actual = problem(path, "results.rows.0.keys=[]")
    assert "results.rows.0: got 'base', expected a section of keys" in actual


@pytest.mark.parametrize("keys", ["prompt: null", "prompt: 'a {text} b'", "pooling: last"])
def test_a_prompt_out_of_the_mean_needs_a_mean_and_a_prefix(tmp_path, keys):
    actual = problem(written(tmp_path, f"bi: {{prompt_in_mean: false, {keys}}}"))
    assert "bi: prompt_in_mean false is for pooling mean and a prompt that ends in {text}" in actual


@pytest.mark.parametrize("keys", ["attention: causal", "layers: none"])
def test_a_sink_is_kept_only_where_layers_are_bidirectional(tmp_path, keys):
    actual = problem(written(tmp_path, f"bi: {{keep_sink: true, {keys}}}"))
    assert "bi: keep_sink is for bidirectional layers, and there are none; expected" in actual


@pytest.mark.parametrize("module", ["embedding", "all"])
def test_lora_is_refused_with_what_it_cannot_train(tmp_path, module):
    actual = problem(written(tmp_path, f"bi: {{stages: [{{train: [{module}], lora: {{}}}}]}}"))
    assert f"bi.stages.0: lora cannot train {module}; expected lora: null" in actual


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
        (["bi.form=[eol]"], "bi.form: got [\"eol\"], expected 'plain'"),
        ([f"bi.prompt={json.dumps(ECHO)}"], "the prompt reads the text twice; expected form: echo"),
        (["bi.prompt='{text} and {text}'"], "expected {text} once"),
    ],
)
def test_what_contradicts_a_form_is_refused(tmp_path, keys, said):
    assert said in problem(written(tmp_path, ""), *keys)


LAUGHS = "\n".join(
    ["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{LAUGHS}\nmodel: {{name: *a11}}", "more than 100000 values"),
        ("model: &a [*a]", "more than 100000 values"),
        ("seed: " + "[" * 40 + "]" * 40, "or 30 levels"),
        ("seed: " + "[" * 100_000, "or 30 levels"),
        ("a: &a {name: x}\nmodel: {<<: *a}", ":2: not YAML (<< is not read; write its keys out)"),
        ("model: {name: !!binary aGk=}", "the tag !!binary is not read"),
        ("model: !!python/object:os.system {}", "is not read"),
        ("1: 2", "1: got 1, expected a text as key"),
        ("seed: 010", "seed: got '010', expected a whole number"),
        ("seed: 1:30", "seed: got '1:30'"),
    ],
)
def test_yaml_that_multiplies_or_means_something_else_is_refused(tmp_path, text, expected):
    assert expected in problem(written(tmp_path, text))


def test_an_alias_is_read_and_an_override_changes_one_place(tmp_path):
    path = written(tmp_path, "bi: {stages: [&one {max_steps: 3}, *one]}")
    stages = load_config(path, ["bi.stages.0.max_steps=4"]).bi.stages
    assert [stage.max_steps for stage in stages] == [4, 3]


def test_a_date_is_a_text(tmp_path):
    assert load_config(written(tmp_path, "model: {revision: 2020-01-01}")).model.revision


NUMBERS = [
    name.replace(".N", ".0")
    for name, field in keys()
    if {int, float} & {field.annotation, *get_args(field.annotation)}
]
TEXTS = [
    name.replace(".N", ".0")
    for name, field in keys()
    if {str, list[str]} & {field.annotation, *get_args(field.annotation)}
]


ITEMS = ["bi.stages=[{lora: {}}]", "results.rows=[{name: x}]", "probing.models=[{name: x}]"]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400", "1" + "0" * 30, "1" * 5000])
def test_no_key_takes_a_number_without_end(tmp_path, value):
    assert len(NUMBERS) > 60
    for key in NUMBERS:
        actual = problem(written(tmp_path, ""), *ITEMS, f"{key}={value}")
        assert f"command line: {key}: got " in actual, actual


@pytest.mark.parametrize("value", ["a\\0b", "a\\ud800b", "\\udfff"])
def test_no_key_takes_a_text_that_no_file_would(tmp_path, value):
    assert len(TEXTS) > 20
    for key in TEXTS:
        shape = [f'{key}="{value}"', f'{key}=["{value}"]']
        actual = [problem(written(tmp_path, ""), *ITEMS, one) for one in shape]
        assert all(f"command line: {key}" in one for one in actual), actual


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=5", "model.device=cpu"], "model: got 5, expected a section of keys"),
        (["bi.stages=x", "bi.stages.0.seed=1"], "unknown key"),
        (["bi.stages=x", "bi.stages.0.max_steps=1"], "bi.stages: got 'x', expected a list"),
        (["bi.layers=[1, a]"], "bi.layers.1: got 'a', expected a whole number"),
        (["bi.layers=5"], "bi.layers: got 5, expected 'all' or 'none' or keys with values or a l"),
        (["bitune.layers={every: 0}"], 'bitune.layers: got {"every": 0}, layers must name some'),
        (["bitune.layers=[]"], "bitune.layers: got [], layers must name some"),
        (["dry_run=x"], "dry_run: got 'x', expected true or false or a whole number"),
        (["results.rows=[{name: ''}]"], "results.rows.0.name: got '', expected a text that is not"),
        (["results.rows=[{}]"], "results.rows.0.name: expected a value; it has no default"),
        (["probing.seeds=[-1]"], "probing.seeds.0: got -1, expected greater than or equal to 0"),
        (["results.seeds=[-1]"], "results.seeds.0: got -1"),
        (["bi.stages=[{train: []}]"], "bi.stages.0.train: got [], expected one at least"),
        (["bi.stages=[{train: [ffn@3-1]}]"], "bi.stages.0.train.0: got 'ffn@3-1'"),
        (["bi.stages=[{train: [ffn@0-999999999999]}]"], "bi.stages.0.train.0: got 'ffn@0-9"),
        (["bi.stages=[{train: [ffn@٣]}]"], "bi.stages.0.train.0: got 'ffn@٣'"),
        (["bi.stages=[{learning_rate: ١e٤}]"], "bi.stages.0.learning_rate: got '١e٤'"),
        (["bi.stages." + "1" * 5000 + ".max_steps=1"], "unknown key"),
        (["seed=" + "[" * 3000], "seed: got '[[["),
        (["model.name=" + "x" * 10**6 + "\0"], "model.name: got 'xxx"),
    ],
)
def test_a_value_is_blamed_on_its_own_key_in_words_of_yaml(tmp_path, overrides, expected):
    actual = problem(written(tmp_path, ""), *overrides)
    assert expected in actual and len(actual) < 300 + len(overrides[0])


def files(tmp_path, **texts):
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path / "last.yaml"


def test_a_file_changes_its_base_and_a_base_its_own(tmp_path):
    """Sections go into each other, numbers name items of a list, any other value replaces."""
    (tmp_path / "below").mkdir()
    stages = "[{objective: simcse, max_steps: 7, seed: 1}, {objective: mntp, train: [ffn]}]"
    stages = stages.replace(", seed: 1", "")
    first = (
        f"seed: 5\nmodel: {{name: first, dtype: auto}}\nbi: {{prompt: null, stages: {stages}}}\n"
    )
    (tmp_path / "below" / "first.yaml").write_text(first)
    (tmp_path / "below" / "middle.yaml").write_text("base: first.yaml\nevaluation: {sts: [tiny]}\n")
    path = files(
        tmp_path,
        last="base: below/middle.yaml\nmodel: {name: last}\n"
        "evaluation: {sts: [STS12, STS13]}\nbi: {stages: {1: {train: [attention]}}}\n",
    )
    config = load_config(path, ["bi.stages.0.temperature=0.5"])
    assert (config.seed, config.model.name, config.model.dtype) == (5, "last", "auto")
    assert config.evaluation.sts == ["STS12", "STS13"]
    assert [stage.train for stage in config.bi.stages][1] == ["attention"]
    assert (config.bi.stages[0].max_steps, config.bi.stages[0].temperature) == (7, 0.5)
    assert config.output_dir == "runs/last"
    whole = tmp_path / "whole.yaml"
    whole.write_text(dump_config(config))
    assert load_config(whole) == config


def test_a_section_without_keys_is_as_in_the_base(tmp_path):
    path = files(tmp_path, first="model: {name: first}\n", last="base: first.yaml\nmodel:\n")
    assert load_config(path).model.name == "first"


def test_a_form_replaces_the_prompt_of_the_base(tmp_path):
    path = files(tmp_path, first="bi: {prompt: null}\n", last="base: first.yaml\nbi: {form: eol}\n")
    assert load_config(path).bi.prompt == FORMS["eol"][0]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"last": "base: last.yaml\n"}, "last.yaml -> last.yaml is circular"),
        (
            {"first": "base: last.yaml\n", "last": "base: first.yaml\n"},
            "last.yaml -> first.yaml -> last.yaml is circular",
        ),
        ({"last": "base: none.yaml\n"}, "none.yaml is no file; expected one"),
        ({"last": 'base: "a\\0b"\n'}, "base: got 'a\\x00b', expected the path of a YAML file"),
        ({"last": "base: ~nobody of this name/a.yaml\n"}, "a.yaml is no file; expected one"),
        ({"last": "base: [a.yaml]\n"}, 'base: got ["a.yaml"], expected the path of a YAML file'),
        ({"first": "model: [\n", "last": "base: first.yaml\n"}, "first.yaml:2: not YAML"),
        (
            {"first": "bi: {stages: []}\n", "last": "base: first.yaml\nbi: {stages: {3: {}}}\n"},
            "bi.stages: got",
        ),
    ],
)
def test_a_base_that_cannot_be_is_one_line(tmp_path, texts, expected):
    with pytest.raises(UserError) as error:
        load_config(files(tmp_path, **texts))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_base_is_no_key_of_the_command_line():
    with pytest.raises(UserError, match="base: unknown key"):
        load_config(None, ["base=other.yaml"])


def test_a_base_that_is_a_link_to_itself_is_no_file(tmp_path):
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    path = files(tmp_path, last="base: loop.yaml\n")
    assert "loop.yaml is no file; expected one" in problem(path)


def test_a_home_that_no_shell_has_written_out_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(None, ["output_dir=~/runs"]).output_dir == f"{tmp_path}/runs"
    nobody = "output_dir='~nobody of this name/runs'"
    assert load_config(None, [nobody]).output_dir == "~nobody of this name/runs"
