"""Is it the sink's fall that costs the language model? Exchange the first token's share alone.

python -m ubmoe.shift configs/tiny.yaml ubmoe.bi=runs/tiny/bi
"""

from ubmoe.interventions import programs

if __name__ == "__main__":
    programs.run("shift", __doc__ or "")
