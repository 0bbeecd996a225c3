"""What a program would do, without doing it."""
