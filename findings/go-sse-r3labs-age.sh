#!/usr/bin/env bash
# github.com/r3labs/sse/v2 v2.10.0 (Go) gives up at the first cut of any stream that began more than 15 minutes ago,
# however well it ran. Its default strategy is the exponential one of gopkg.in/cenkalti/backoff.v1, which stops after 15
# minutes of failing, but whose time begins with Subscribe and not with the first failure; a stream that was received
# does not set it back. For the same reason its waits grow with the number of cuts, not with that of failures in a row.
# A ReconnectStrategy whose MaxElapsedTime is 0 goes on.
#
# Seen: the default strategy whose clock is put forward by 16 minutes while the stream runs: after the cut no second
# request, and Subscribe returns "unexpected EOF". With MaxElapsedTime 0: it comes again.
# Fails if that changes. Needs bash, Go, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(3):
            self.wfile.write(b"9\r\ndata: x\n\n\r\n")
            time.sleep(.2)
        self.close_connection = True
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18614), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/r3labs/sse/v2"
	"gopkg.in/cenkalti/backoff.v1"
)

type clock struct{ ahead atomic.Int64 }

func (c *clock) Now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// follow returns how many events came in 5 s at most, and what Subscribe returned.
func follow(limited bool) (n int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	clock := &clock{}
	strategy := backoff.NewExponentialBackOff() // what the library itself takes
	strategy.Clock = clock
	if !limited {
		strategy.MaxElapsedTime = 0
	}
	c := sse.NewClient("http://127.0.0.1:18614/")
	c.ReconnectStrategy = strategy
	err = c.SubscribeRawWithContext(ctx, func(*sse.Event) {
		n++
		if n == 3 {
			clock.ahead.Store(int64(16 * time.Minute))
		}
		if n == 6 {
			cancel()
		}
	})
	return n, err
}

func main() {
	old, oldErr := follow(true)
	forever, _ := follow(false)
	fmt.Printf("16 minutes old: %d events, then %v; without a limit: %d events\n", old, oldErr, forever)
	if old != 3 || oldErr == nil || forever != 6 {
		os.Exit(1)
	}
}
G
go mod init finding 2>/dev/null
go get github.com/r3labs/sse/v2@v2.10.0 2>/dev/null
go build -o main .
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18614) 2>/dev/null; do sleep .1; done
timeout 20 ./main
