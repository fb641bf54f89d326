"""The habits by theme."""
