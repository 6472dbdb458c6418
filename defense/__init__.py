"""Trace one wrong prediction to the training rows that caused it, undo them, prove it.

The story, one module per step:

1. ``datasets`` loads a split; ``attacks`` plants a known poison (the drill).
2. ``models`` and ``training`` give the suspect model.
3. ``influence`` fits EK-FAC factors and scores every training row against the
   affected input and its transforms.
4. ``detectors`` turn scores into flags; ``unlearning`` removes what was flagged.
5. ``audit`` measures before and after; ``gate`` decides from the recorded evidence;
   ``tracking`` writes it to MLflow.

Nothing is imported here, so that ``defense gate`` answers without torch.
"""
