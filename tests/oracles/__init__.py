"""Independent transcriptions of the papers' equations in NumPy; they share no code with the package."""
