"""The kept sink as one virtual token of stock peft, in front of a bidirectional model.

The first token sees itself alone, so where every text begins with the same one, its keys and values
depend on no text: peft's prefix tuning can hold them, and the model reads the rest from position 1.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PrefixTuningConfig, TaskType
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ubmoe.bidirectional import attending
from ubmoe.layered import keeps_sink, partial_layers
from ubmoe.models.lora import WEIGHTS

SINK = "sink"  # the folder within an encoder's


@torch.no_grad()
def save_sink(model: PreTrainedModel, firsts: Sequence[int], folder: Path) -> int | None:
    """The first token's keys and values as peft saves a prefix of one; returns the token.

    firsts: the first tokens of some texts. None, and nothing is written, where they differ, where
    other layers are causal, and where layers have keys of several sizes: no stock prefix says that.
    """
    config = model.config.get_text_config()
    if not keeps_sink(config) or partial_layers(config) is not None or len(set(firsts)) != 1:
        return None
    with attending(model, bidirectional=False):
        ids = torch.tensor([[firsts[0]]], device=model.device)
        cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
    cached = [states[0, :, 0] for layer in cache.layers for states in (layer.keys, layer.values)]
    if len({states.shape for states in cached}) != 1:
        return None
    heads, size = cached[0].shape
    PrefixTuningConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        num_virtual_tokens=1,
        num_layers=len(cache.layers),
        token_dim=heads * size,
        num_attention_heads=heads,
        inference_mode=True,
    ).save_pretrained(str(folder))
    flat = torch.cat([states.reshape(1, -1) for states in cached], dim=1).cpu()
    save_file({"prompt_embeddings": flat}, folder / WEIGHTS, metadata={"format": "pt"})
    return firsts[0]
