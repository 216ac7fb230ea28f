"""Long tests of programs, which `.ci/run` runs in stages of their own; `pytest` alone leaves them out."""
