"""The parts every system is built from: signatures, distances, solvers. Names no paper, imports no family."""
