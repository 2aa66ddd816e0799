"""Runs requests in the engine, turns their tokens into typed parts, and checks limits."""
