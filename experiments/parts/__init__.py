"""Parts of trained models that several experiments share."""
