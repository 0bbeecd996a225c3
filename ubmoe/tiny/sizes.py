"""How much of the embedded language a model is scored and probed on; tests take less."""

STS_PAIRS = 1500
GRAMMAR_SENTENCES = 300
PROBING_ITEMS = 1200
