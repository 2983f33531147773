"""What is wrong in the zoos themselves, seen with their eager attention too or before any attention is asked for."""
KNOWN = {
    "mindnlp": {},
    "mindone": {},
}
