"""Program -> weight patch."""
