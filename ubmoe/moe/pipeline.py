"""The steps of train_ubmoe.py, a function each: read, load, train the routers, save, score."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from mteb.abstasks.sts import AbsTaskSTS
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from ubmoe import endings
from ubmoe.bidirectional import set_attention
from ubmoe.bounds import expanded
from ubmoe.config import Config, Route, UserError
from ubmoe.data.chats import Chat, read_chats
from ubmoe.data.tokens import sentences_of
from ubmoe.encoder.sentence_encoder import load_saved
from ubmoe.evaluate import generation
from ubmoe.evaluate.sts import sts_scores, sts_tasks
from ubmoe.models import cards
from ubmoe.models.loading import best_device, load_model
from ubmoe.models.precision import weights_dtype
from ubmoe.models.source import ModelSource
from ubmoe.models.streams import open_weights
from ubmoe.moe import export, router_training, routers
from ubmoe.moe.distillation import Distillation
from ubmoe.moe.export import encoder_attention
from ubmoe.moe.joining import check_alike, check_joins, check_pair, load_mixture
from ubmoe.moe.routes import route_of
from ubmoe.recording import Run
from ubmoe.similarity import sections
from ubmoe.training.checkpoints import StageRun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Everything that is read before any model is loaded."""

    source: ModelSource  # of the language model
    tuned: ModelSource  # of its encoder
    attention: str  # the encoder's: bidirectional, or causal (the study's control)
    chats: list[Chat]
    held_out: list[Chat]
    sentences: list[str]
    sts: list[AbsTaskSTS]
    counts: dict[str, int]
    joins: bool = True  # whether a mixture is made, with routers to train; an adapter needs none

    @property
    def encoder(self) -> Path:
        return Path(self.tuned.path)


def read(config: Config, source: ModelSource) -> Inputs:
    """Raises UserError for whatever is missing or wrong, before a model is loaded."""
    encoder = expanded(config.ubmoe.bi or f"{config.output_dir}/bi").resolve()
    attention = encoder_attention(encoder)
    generation.check_tasks(config.evaluation.generation, config.evaluation.data)
    check_joins(source.settings.model_type, config.ubmoe)
    sts = sts_tasks(config.evaluation.sts)
    tokenizer, tuned = source.tokenizer, source.at(encoder)
    if tuned.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"ubmoe.bi: {encoder} has another tokenizer than {config.model.name}")
    settings = config.ubmoe
    read_in = read_chats(settings.dataset, tokenizer, settings.max_tokens, settings.max_rows)
    chats, kept = read_in.held_out(settings.held_out, "ubmoe.held_out")
    sentences = []
    if settings.mixes and settings.objective == "both":
        sentences = sentences_of(settings.sentences, tokenizer, len(chats))
    counts = {"chats": len(chats), "held_out": len(kept), "truncated": read_in.truncated}
    log.info("%(chats)d chats, %(held_out)d held out, %(truncated)d truncated", counts)
    counts |= {"dropped": read_in.dropped, "max_tokens": settings.max_tokens}
    return Inputs(source, tuned, attention, chats, kept, sentences, sts, counts, settings.mixes)


def join(config: Config, inputs: Inputs, place: Callable[[str], Path]) -> dict[str, Any]:
    """Write what `ubmoe.export` names, and with `modes` the mixture, from the two models' files.

    place: where to. Returns the fingerprint of the bi model, and what is to be said of the adapter.
    Raises UserError for models that cannot be joined.
    """
    dtype = weights_dtype(config.model.dtype, best_device(config.model.device))
    uni = open_weights(inputs.source, dtype)
    bi = open_weights(inputs.tuned, uni.dtype)
    (check_alike if inputs.joins else check_pair)(uni, bi)
    settings, common = config.ubmoe, (uni, bi, inputs.source.tokenizer, inputs.encoder)
    if inputs.joins:
        said = made(config, inputs, routed=True)
        top_k, renormalised = settings.top_k, settings.norm_topk_prob
        export.save_mixture(*common, place("ubmoe"), said, top_k, renormalised)
    report: dict[str, Any] = {"bi_weights": bi.fingerprint()}
    said = made(config, inputs, routed=False)
    if "modes" in settings.export:
        export.save_modes(*common, place("modes"), said)
    if "adapter" in settings.export:
        where = place("adapter")
        report["adapter"] = export.save_adapter(*common, where, said, settings.rank)
    return report


def load(inputs: Inputs, place: Callable[[str], Path]) -> PreTrainedModel:
    """The mixture that the first process has written, in every process; or the language model of
    the adapter where there is none. Raises UserError.
    """
    folder = place("ubmoe" if inputs.joins else "adapter")
    state = PartialState()
    state.wait_for_everyone()
    if not folder.is_dir():
        raise UserError(
            f"output_dir: process {state.process_index} does not see {folder}; expected a folder "
            "that all processes share"
        )
    stored = inputs.source.at(folder)
    model = load_mixture(stored, inputs.attention) if inputs.joins else load_model(stored)
    state.wait_for_everyone()  # what the run moves at its end has been read by all
    return model


def train(config: Config, inputs: Inputs, model: PreTrainedModel) -> dict[str, Any]:
    """Start and train the routers; returns what the record says of them, {} without a mixture."""
    if not inputs.joins:
        return {}
    report = routers.start(model, config.ubmoe, inputs.chats, inputs.held_out, config.seed)
    directory, resume = Path(config.output_dir) / "routers", config.resume == "auto"
    stage_run = StageRun(directory, config.seed, resume, distributed=config.distributed)
    distillation = None
    if config.ubmoe.objective == "both":
        encoder, bidirectional = encoder_of(inputs, model), inputs.attention == "bidirectional"
        distillation = Distillation(inputs.chats, inputs.sentences, encoder, model, bidirectional)
    log = router_training.train(model, config.ubmoe, inputs.chats, stage_run, distillation)
    shares = routers.shares_by_role(model, inputs.held_out)
    return report | {"log": log, "bi_weight_by_role": shares, "counts": inputs.counts}


def encoder_of(inputs: Inputs, model: PreTrainedModel) -> SentenceTransformer:
    """The mixture in the tuned encoder's form: its prompt, its pooling, its length."""
    encoder = load_saved(str(inputs.encoder), str(model.device))
    encoder[0].model = model.base_model
    return encoder


def made(config: Config, inputs: Inputs, routed: bool) -> str:
    """How the exported model was made, for its card; `routed` where routers are in it."""
    settings, lines = (
        config.ubmoe,
        [
            f"- language model: {cards.named(config.model.name)}, {config.model.dtype}",
            f"- encoder: {cards.named(str(inputs.encoder))}, of {inputs.attention} attention",
        ],
    )
    if routed:
        length = f"{settings.max_steps} steps"
        if settings.max_steps < 0:
            length = f"{settings.num_train_epochs:g} epochs"
        lines.append(
            f"- routers: top_k {settings.top_k}, started from {settings.router_init}, objective "
            f"{settings.objective}, {length} of {settings.per_device_train_batch_size} chats "
            f"({cards.named(settings.dataset)}), learning rate {settings.learning_rate:g}, seed "
            f"{config.seed}"
        )
    return "\n".join(["\n## How it was made\n", "Joined by train_ubmoe.py of ubmoe.\n", *lines, ""])


def complete_cards(
    config: Config, inputs: Inputs, place: Callable[[str], Path], record: Mapping[str, Any]
) -> None:
    """Add to the card of each saved model what it scored, as far as its routes were scored.

    record: `generation` and `sts`, as the result has them.
    """
    routes, metrics = record["generation"]["routes"], record["generation"]["metrics"]
    settings = config.ubmoe
    kinds: dict[str, tuple[str, Route, list[str]]]
    kinds = {"mixture": ("ubmoe", settings.route, [settings.route])}
    kinds |= {"modes": ("modes", "uni", ["bi", "mode"]), "adapter": ("adapter", "uni", ["adapter"])}
    for kind in settings.export:
        name, route, encoding = kinds[kind]
        results = []
        if scores := routes.get(route):
            results += cards.generation_results(scores["tasks"], metrics, scores["perplexity"])
        for row in sections(record):
            if row["route"] in encoding and row["attention"] == inputs.attention:
                results += cards.sts_results(row)
                break
        trained = [settings.dataset] if kind == "mixture" else []
        cards.complete(place(name), config, trained, results)


def _routes(config: Config) -> list[Route]:
    return list(dict.fromkeys((config.ubmoe.route, *config.ubmoe.routes)))


# Of each route.
KEPT = (
    *("tasks", "average", "perplexity", "questions", "stderr"),
    *("perplexity_interval", "answers"),
)


def generation_of(config: Config, inputs: Inputs, model: PreTrainedModel) -> dict[str, Any]:
    """The `generation` section: of `ubmoe.route`, and under `routes` of every route, all causal.

    The route bi under the causal mask is the study's control: what the tuned FFN alone would say.
    """
    set_attention(model, bidirectional=False)
    routes = {}
    main_route: Route = config.ubmoe.route if inputs.joins else "uni"
    for route in _routes(config) if inputs.joins else [main_route]:
        with route_of(model, route) if inputs.joins else nullcontext():
            scores = generation.generation_scores(model, inputs.source.tokenizer, config.evaluation)
            lost = generation.perplexity(model, inputs.held_out, config.evaluation.bf16)
        routes[route] = scores | lost
        for line in endings.scores("generation", {"generation": routes[route]}):
            log.info("route %s: %s", route, line)
    brief = {route: {name: scores[name] for name in KEPT} for route, scores in routes.items()}
    metadata = {"route": main_route, "attention": "causal", "bi_attention": inputs.attention}
    return routes[main_route] | metadata | {"routes": brief}


def sts_of(
    config: Config, inputs: Inputs, model: PreTrainedModel, run: Run
) -> list[dict[str, Any]]:
    """STS of every route under both masks, in the encoder's own form, and of the saved adapter."""
    if not inputs.sts:
        return []
    rows: list[dict[str, Any]] = []

    def add(encoder: SentenceTransformer, route: str, attention: str) -> None:
        asked = (config.evaluation.batch_size, config.evaluation.bf16, run.partial(len(rows)))
        scores = sts_scores(encoder, inputs.sts, *asked, route)
        rows.append({"route": route, "attention": attention, **scores})
        for line in endings.scores("generation", {"sts": rows[-1:]}):
            log.info("%s", line)

    if inputs.joins:
        encoder = encoder_of(inputs, model)
        for attention in ("bidirectional", "causal"):
            set_attention(model, bidirectional=attention == "bidirectional")
            for route in _routes(config):
                with route_of(model, route):
                    add(encoder, route, attention)
        set_attention(model, bidirectional=False)
    if "adapter" in config.ubmoe.export:
        saved = load_saved(str(run.place("adapter")), str(model.device))
        add(saved, "adapter", inputs.attention)
    return rows
