"""The whole configuration: one strict tree, read from YAML and `key=value`, printed by --help.

Nothing heavy is imported here, so that --help and every complaint about a key come before torch is
loaded.
"""

from ubmoe.config.effects import MADE, SCORED, deciding_weights, default, leaves, unlike
from ubmoe.config.errors import UserError, error_reason, listed, shown
from ubmoe.config.help import help_text
from ubmoe.config.reading import (
    DEFAULT_CONFIG,
    dump_config,
    load_config,
    shipped,
    validated,
    with_keys,
)
from ubmoe.config.schema import (
    ECHO,
    EOL,
    FORMS,
    MINI_BATCH,
    PROMPT,
    QUESTION,
    TABLE2,
    TABLE4,
    TASKS_OF_BITUNE,
    BiSection,
    BituneSection,
    Config,
    DataSection,
    DependenceSection,
    EvaluationSection,
    FirstToken,
    Form,
    HubSection,
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
    TrajectorySection,
    WhitenSection,
    keys,
    numbered,
)
