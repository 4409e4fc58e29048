"""The family's pieces inside other people's trainers."""
