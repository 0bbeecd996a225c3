"""Which layers may be bidirectional? Score every pattern of them, without any training.

python -m ubmoe.scan configs/tiny.yaml
python -m ubmoe.scan configs/qwen2.5-0.5b.yaml scan.pairs=path/to/STSB-dev.tsv
"""

from ubmoe.interventions import programs

if __name__ == "__main__":
    programs.run("scan", __doc__ or "")
