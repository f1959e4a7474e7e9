#!/usr/bin/env bash
# Stream.Close of github.com/donovanhide/eventsource v0.0.0-20210830082556-c59027999da0 (Go) closes the channels, but
# not the connection. The goroutine that reads from it looks whether it is closed when the next event has come: on a
# quiet stream the server keeps a client that is not there, comments (heartbeats) reach it and do not end it, either.
# Who wants the connection to end makes the request with a context and cancels that.
#
# Seen: 6 s of comments after Close the connection is open; a request whose context is cancelled is gone at once.
# Fails if that changes. Needs bash, Go, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: x\n\n")
        begun = time.time()
        try:
            while time.time() < begun + 6:
                time.sleep(.2)
                self.wfile.write(b":\n")
            print(self.path, "open", flush=True)
        except OSError:
            print(self.path, "gone", flush=True)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18617), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"context"
	"net/http"
	"time"

	"github.com/donovanhide/eventsource"
)

func main() {
	for _, path := range []string{"/closed", "/cancelled"} {
		ctx, cancel := context.WithCancel(context.Background())
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://127.0.0.1:18617"+path, nil)
		stream, err := eventsource.SubscribeWithRequest("", req)
		if err != nil {
			panic(err)
		}
		<-stream.Events
		stream.Close()
		if path == "/cancelled" {
			cancel()
		}
	}
	time.Sleep(7 * time.Second)
}
G
go mod init finding 2>/dev/null
go get github.com/donovanhide/eventsource@v0.0.0-20210830082556-c59027999da0 2>/dev/null
go build -o main .
python3 server.py >seen &
until (echo >/dev/tcp/127.0.0.1/18617) 2>/dev/null; do sleep .1; done
timeout 20 ./main
sort seen
[ "$(sort seen)" = $'/cancelled gone\n/closed open' ]
