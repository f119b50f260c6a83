"""The five systems that this project is made from, as their authors run them, on the embedded model."""
