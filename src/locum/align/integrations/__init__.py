"""The family's losses inside other people's trainers; each module needs the library of its name."""
