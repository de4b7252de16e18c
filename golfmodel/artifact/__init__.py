"""The submitted file: quantized weights, their container, the paid prefix, and what all of it weighs."""
