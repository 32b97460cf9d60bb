"""What a program needs of accelerators that are not there: memory, bytes, seconds, collectives."""
