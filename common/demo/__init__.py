"""The built-in demo: word problems and a small base model made on the spot, nothing downloaded."""
