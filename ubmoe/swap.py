"""Which layers' tuning costs the language model? Swap one layer at a time, and read causally.

python -m ubmoe.swap configs/tiny.yaml ubmoe.bi=runs/tiny/bi
"""

from ubmoe.interventions import programs

if __name__ == "__main__":
    programs.run("swap", __doc__ or "")
