"""The whole configuration: one strict tree, read from YAML and `key=value`, printed by --help.

Nothing heavy is imported here, so that --help and every complaint about a key come before torch is
loaded.
"""

from ubmoe.config.effects import MADE, SCORED, deciding_weights, leaves, unlike
from ubmoe.config.errors import UserError, listed
from ubmoe.config.help import help_text
from ubmoe.config.reading import DEFAULT_CONFIG, dump_config, load_config, with_keys
from ubmoe.config.schema import (
    MINI_BATCH,
    PROMPT,
    QUESTION,
    TABLE2,
    TABLE4,
    TASKS_OF_BITUNE,
    BiSection,
    BituneSection,
    Config,
    DependenceSection,
    EvaluationSection,
    Layers,
    LoraSection,
    ModelSection,
    MoeSection,
    ProbedModel,
    ProbingSection,
    ResultsSection,
    Route,
    RowSection,
    ScanSection,
    Section,
    StageSection,
    TrainingSection,
    keys,
    numbered,
)

__all__ = [
    "DEFAULT_CONFIG",
    "MADE",
    "MINI_BATCH",
    "PROMPT",
    "QUESTION",
    "SCORED",
    "TABLE2",
    "TABLE4",
    "TASKS_OF_BITUNE",
    "BiSection",
    "BituneSection",
    "Config",
    "DependenceSection",
    "EvaluationSection",
    "Layers",
    "LoraSection",
    "ModelSection",
    "MoeSection",
    "ProbedModel",
    "ProbingSection",
    "ResultsSection",
    "Route",
    "RowSection",
    "ScanSection",
    "Section",
    "StageSection",
    "TrainingSection",
    "UserError",
    "deciding_weights",
    "dump_config",
    "help_text",
    "keys",
    "leaves",
    "listed",
    "load_config",
    "numbered",
    "unlike",
    "with_keys",
]
