"""The card of a saved encoder: its vectors in sentence-transformers, in plain transformers and in
servers, word for word.

Servers read no chat template of sentence-transformers, and only the older names of its modules, so
the prompt stands in the card, and the modules are named as all readers know them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from ubmoe.config import BiSection, Config
from ubmoe.data import tokens
from ubmoe.models import cards

FILLERS = ("0", "1 2 3 4")  # texts that share no token at their end
MODES = {  # of 1_Pooling/config.json, in the names that servers know
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
STOCK = "sentence_transformers.models."


def name_modules_for_servers(folder: Path) -> None:
    """Write modules.json and the pooling in the names of sentence-transformers 2 to 5.

    vLLM, text-embeddings-inference and llama.cpp's converter know these alone, and would pool by
    another rule without a word. sentence-transformers 6 reads them as its own.
    """
    path = folder / "modules.json"
    modules = json.loads(path.read_text(encoding="utf-8"))
    for module in modules:
        if module["type"].startswith("sentence_transformers."):
            module["type"] = STOCK + module["type"].rpartition(".")[2]
    path.write_text(json.dumps(modules, indent=2), encoding="utf-8")
    path = folder / "1_Pooling" / "config.json"
    given = json.loads(path.read_text(encoding="utf-8"))
    named = {"word_embedding_dimension": given["embedding_dimension"]}
    named |= {name: mode == given["pooling_mode"] for mode, name in MODES.items()}
    named |= {"include_prompt": given["include_prompt"]}
    path.write_text(json.dumps(named, indent=4), encoding="utf-8")


def plain(tokenizer: PreTrainedTokenizerBase, settings: BiSection, whitened: bool) -> str:
    """The section of a card that computes the vectors with transformers alone."""
    before, after = (settings.prompt or "{text}").split("{text}")
    end = _end(tokenizer, before, after)
    pooled = {
        "mean": "states.mean(0)",
        "weighted_mean": "(weights / weights.sum()) @ states",
        "last": "states[-1]",
    }[settings.pooling]
    if not settings.prompt_in_mean:
        pooled = f"states[{len(tokens.prompt_ids(tokenizer, before))} :].mean(0)"
    lines = ["states = model(torch.tensor([ids])).last_hidden_state[0]"]
    if settings.pooling == "weighted_mean":
        lines.append("weights = torch.arange(1.0, len(ids) + 1)")
    if whitened:
        pooled = f'dense["linear.weight"] @ {pooled} + dense["linear.bias"]'
    around = [json.dumps(part, ensure_ascii=False) if part else "" for part in (before, after)]
    return PLAIN.format(
        read=" + ".join(filter(None, [around[0], "text", around[1]])),
        most=settings.max_tokens,
        kept=settings.max_tokens - len(end),
        end=f" + {end}" if end else "",
        lines="\n    ".join([*lines, f"return {pooled}"]),
        load="\nfrom safetensors.torch import load_file" if whitened else "",
        dense='\ndense = load_file(f"{directory}/2_Dense/model.safetensors")' if whitened else "",
    )


def _end(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> list[int]:
    """The last tokens of every text, which a truncated text keeps."""
    first, second = (tokenizer(before + text + after)["input_ids"] for text in FILLERS)
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return list(first[len(first) - count :])


def servers(encoder: SentenceTransformer, settings: BiSection, family: str) -> str:
    """The section of a card with a line for each server, as their sources read.

    family: the model_type of config.json.
    """
    if settings.pooling == "weighted_mean" or not settings.prompt_in_mean:
        return UNSERVED
    before, after = (settings.prompt or "{text}").split("{text}")
    text = json.dumps({"input": f"{before}The dog sleeps.{after}"}, ensure_ascii=False)
    name = encoder.default_prompt_name
    tei = TEI.format(prompt=f" --default-prompt-name {name}" if name else "")
    return SERVERS.format(
        prompted=PROMPTED.format(apart=PROMPT_BY_NAME if name else "") if before + after else "",
        text=text.replace("'", "'\\''"),
        tei=NO_TEI if settings.bidirectional and family != "qwen2" else tei,
        attention="non-causal" if settings.bidirectional else "causal",
        pooling=settings.pooling,
    )


def instructed(settings: BiSection) -> str:
    """The section of a card that says which instructions are saved; empty where there are none."""
    if not settings.instructions:
        return ""
    return INSTRUCTED.format(
        names=", ".join(settings.instructions), name=[*settings.instructions][0]
    )


def usage(
    encoder: SentenceTransformer,
    tokenizer: PreTrainedTokenizerBase,
    settings: BiSection,
    family: str,
) -> str:
    """The card of an encoder that stock libraries read."""
    whitened = settings.whiten is not None
    parts = [
        CARD.format(attention="bidirectional" if settings.bidirectional else "causal"),
        plain(tokenizer, settings, whitened),
        WHITEN_CARD if whitened else "",
        instructed(settings),
        servers(encoder, settings, family),
        LANGUAGE_MODEL if settings.bidirectional else "",
    ]
    return "".join(parts)


def complete(folder: Path, config: Config, scores: Mapping[str, Any]) -> None:
    """Add the scores of the `sts` section, and how the encoder was trained."""
    stages = config.bi.stages
    made = [cards.stage_line(stage) for stage in stages] or ["Nothing was trained."]
    text = "\n".join(
        [
            "\n## How it was made\n",
            f"By train_bi.py, from {cards.named(config.model.name)}, seed {config.seed}.\n",
            *made,
            "",
        ]
    )
    results = cards.sts_results(scores)
    cards.complete(folder, config, [stage.dataset for stage in stages], results, text)


METADATA: dict[str, Any] = {
    "library_name": "sentence-transformers",
    "pipeline_tag": "sentence-similarity",
    "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "ubmoe"],
}
CARD = f"""# A language model as a sentence encoder

A causal language model as an encoder with {{attention}} attention; its head is still there. `.` is
the folder of this card.

```python
{cards.START}
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer(directory)  # the prompt, the pooling and the length are saved
vectors = encoder.encode(["The dog sleeps.", "A cat sat in the garden."])
```
"""
PLAIN = f"""
The same vectors with transformers alone:

```python
{cards.START}
import torch{{load}}
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModel.from_pretrained(directory).eval(){{dense}}


@torch.no_grad()
def vector(text):
    ids = tokenizer({{read}})["input_ids"]
    if len(ids) > {{most}}:
        ids = ids[:{{kept}}]{{end}}
    {{lines}}


texts = ["The dog sleeps.", "A cat sat in the garden."]
vectors = torch.stack([vector(text) for text in texts])
```
"""
INSTRUCTED = """
Instructions by task ({names}), which mteb takes by itself, stand right before a text:

```python
vectors = encoder.encode(["The dog sleeps."], prompt_name="{name}")
```
"""
PROMPTED = "\nThey put no prompt around a text, so send it in its prompt, as here{apart}."
PROMPT_BY_NAME = "; text-embeddings-inference alone adds it by its name"
SERVERS = """
Served, by the servers' sources (not run).{prompted}

    vllm serve . --runner pooling
    curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{text}'

{tei}
    python convert_hf_to_gguf.py . --outfile model.gguf --outtype f32
    llama-embedding -m model.gguf --pooling {pooling} --attention {attention} -p TEXT
"""
TEI = """    text-embeddings-router --model-id . --dtype float16{prompt}
"""
NO_TEI = """text-embeddings-inference reads `is_causal` of a Qwen2 alone, and this model causally.
"""
UNSERVED = """
vLLM, text-embeddings-inference and llama.cpp cannot pool so: use the code above.
"""
LANGUAGE_MODEL = """
As a language model: `AutoModelForCausalLM.from_pretrained(".", is_causal=True)`. Without
`is_causal=True` a bidirectional encoder would read its own future: its likelihoods mean nothing.
transformers 5.2 or newer reads `is_causal`. Older 5 read the encoder causally without a word; 4
refuses its weights.
"""
WHITEN_CARD = """
A whitening, fitted on unlabelled sentences, is the last module: a Dense layer without activation.
"""
