"""Attention dependence, bidirectional fine-tuning and the uni-/bi-directional mixture of experts "
"(UBMoE, ICML 2025)."""
