"""Pure rules: no I/O, no clock, no randomness. Facts in, decisions out."""
