"""FP8 E4M3 (float8_e4m3fn): the limits of its values. torch rounds to it, half to even."""

MAX = 448.0
MIN = 2.0**-9  # the smallest subnormal: what rounds below it is 0
