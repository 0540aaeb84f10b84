"""Names of the types that llama.cpp's quantiser is asked for. Imports nothing that is slow."""

from typing import Literal

QuantiserType = Literal["Q4_0", "Q4_K_M", "Q5_0", "Q8_0", "IQ4_NL"]
