"""Generated input for everything that fledge reads, labelled valid or invalid, and what became of it."""
