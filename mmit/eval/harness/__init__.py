"""mmit models inside other projects' harnesses: lmms-eval, and lm-eval for text; both are imported only here."""
