"""The parts of the study on language models: examples, packed rows, the loss and the step."""
