"""The pipeline: thin stages that `dvc repro` runs in order."""
