"""An agent's session: state between steps, a server in the background, a file, an error that is looked at."""

from __future__ import annotations

import time

from zeroboot import Sandbox

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello from the background")
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""

with Sandbox.create(template="python", timeout=300) as sb:
    sb.run("orders = [3, 4, 5]")
    failed = sb.run("sum(order.amount for order in orders)")
    print("first try:", failed.error)
    print("second try:", sb.run("sum(orders)").check().value)  # state is still there

    python = sb.run("import sys; print(sys.executable)").stdout.strip()
    sb.files.write("server.py", SERVER)
    server = sb.commands.start([python, "server.py"], tag="server")
    for _ in range(50):
        asked = sb.run("import urllib.request as u; u.urlopen('http://127.0.0.1:8000').read().decode()")
        if asked.ok:
            break
        time.sleep(0.1)
    print("the server says:", asked.check().value)
    server.kill()
    print("it ended:", server.wait().outcome)
