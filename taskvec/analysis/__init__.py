"""What people look at: tables and figures made of result rows."""
