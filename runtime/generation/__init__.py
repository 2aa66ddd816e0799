"""Generation: requests run in the engine, their tokens become typed parts, and limits are checked."""
