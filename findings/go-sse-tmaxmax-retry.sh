#!/usr/bin/env bash
# github.com/tmaxmax/go-sse v0.12.0 (Go) takes "retry: 4000" for the mean of a random wait, and only until it is
# connected again: the first wait is any time between 2 and 6 s, and when a connection is made, the client is back at
# its own 0.5 s, unless the server says retry again on each connection. In the HTML standard the time holds for as long
# as the EventSource lives, and a client may wait longer, but not come earlier. (Jitter: -1 is documented for "no
# randomization", and is taken for unset.)
#
# Seen: retry: 4000 on the first of the connections, which the server ends one after the other: in ten runs the first
# waits were between 2 and 6 s, and every later one under 0.8 s. The same with Jitter: -1.
# Fails if that changes. Needs bash, Go, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        first = b"" if "Last-Event-ID" in self.headers else b"retry: 4000\n"
        self.wfile.write(first + b"id: 1\ndata: x\n\n")
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18619), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/tmaxmax/go-sse"
)

// waits returns the first and the longest of the later waits of ten runs.
func waits(jitter float64) (first []time.Duration, later time.Duration) {
	type run struct{ first, later time.Duration }
	runs := make(chan run)
	for range 10 {
		go func() {
			ctx, cancel := context.WithCancel(context.Background())
			var r run
			n := 0
			client := sse.Client{Backoff: sse.Backoff{Jitter: jitter}, OnRetry: func(_ error, wait time.Duration) {
				if n++; n == 1 {
					r.first = wait
				} else if r.later = max(r.later, wait); n == 4 {
					cancel()
				}
			}}
			req, _ := http.NewRequestWithContext(ctx, "GET", "http://127.0.0.1:18619/", nil)
			client.NewConnection(req).Connect()
			runs <- r
		}()
	}
	for range 10 {
		r := <-runs
		first, later = append(first, r.first.Round(time.Millisecond)), max(later, r.later.Round(time.Millisecond))
	}
	return first, later
}

func main() {
	for _, jitter := range []float64{0, -1} {
		first, later := waits(jitter)
		fmt.Printf("Jitter %v: first waits %v, later at most %v\n", jitter, first, later)
		early := false
		for _, wait := range first {
			early = early || wait < 4*time.Second
		}
		if !early || later > 800*time.Millisecond {
			os.Exit(1)
		}
	}
}
G
go mod init finding 2>/dev/null
go get github.com/tmaxmax/go-sse@v0.12.0 2>/dev/null
go build -o main .
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18619) 2>/dev/null; do sleep .1; done
timeout 40 ./main
