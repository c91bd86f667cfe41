"""Judges: who scores an answer by a rubric. `endpoint` asks an OpenAI-compatible service, `local` a model in this process."""
