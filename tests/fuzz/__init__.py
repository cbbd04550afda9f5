"""Random programs: three to six random ops on random weights, compared with the dense ones.

`python -m tests.fuzz --cases 5000 --seed 0` runs any number of them. A case is what its seed and
its number say, on every machine, and is valid by construction: each op is written for the shape at
hand. A failure is printed as the smallest part of the program that fails still.
"""
