"""Prepares the process before Paddle is imported. (Import this first; it imports no Paddle.)"""
