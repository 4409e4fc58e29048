"""Methods side by side (`compare`), papers' claims run here and now (`verify`), and the page that shows what came out."""
