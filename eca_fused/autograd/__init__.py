"""How the operations are differentiated, whatever backend computes them."""
