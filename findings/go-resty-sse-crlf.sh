#!/usr/bin/env bash
# SSESource of resty.dev/v3 v3.0.0-rc.4 (Go) hands on no event of a stream whose lines end in CR LF, as the HTML
# standard allows and some servers send: it looks for two LF in a row. Nothing comes, and no error, until the server
# ends the stream: then all events come as one, with the name of the last and the data of all, each line with its CR.
#
# Seen: of three events, 0.5 s apart, none in 3 s, and at the end of the stream one, named "c\r", with data
# "1\r\n2\r\n3\r". With LF alone: three, as they come.
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
        end = b"\r\n" if self.path == "/crlf" else b"\n"
        for name, data in zip(b"abc", b"123"):
            self.wfile.write(b"event: %c%bdata: %c%b%b" % (name, end, data, end, end))
            time.sleep(.5)
        time.sleep(2.5)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18629), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"resty.dev/v3"
)

// follow returns how many events came in 3 s, and all that came until the end.
func follow(path string) (early int32, all []string) {
	var n atomic.Int32
	source := resty.NewSSESource().SetURL("http://127.0.0.1:18629" + path)
	for _, name := range []string{"a", "b", "c", "a\r", "b\r", "c\r"} {
		source.AddEventListener(name, func(e any) {
			n.Add(1)
			all = append(all, fmt.Sprintf("%q %q", name, e.(*resty.SSE).Data))
		}, nil)
	}
	time.AfterFunc(3*time.Second, func() { early = n.Load() })
	source.Get()
	return early, all
}

func main() {
	early, all := follow("/lf")
	fmt.Println("LF:", early, all)
	earlyCRLF, allCRLF := follow("/crlf")
	fmt.Println("CR LF:", earlyCRLF, allCRLF)
	if early != 3 || len(all) != 3 || earlyCRLF != 0 || fmt.Sprint(allCRLF) != `["c\r" "1\r\n2\r\n3\r"]` {
		os.Exit(1)
	}
}
G
go mod init finding 2>/dev/null
go get resty.dev/v3@v3.0.0-rc.4 2>/dev/null
go build -o main .
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18629) 2>/dev/null; do sleep .1; done
timeout 20 ./main
