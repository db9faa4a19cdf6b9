"""Context assemblers: which part of the past a run sees."""
