"""The WorldVLN policy family: from frames and an instruction to actions, with the engines of a bundle."""
