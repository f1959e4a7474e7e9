package main

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const benchData = `{"event_type":"progress_update","task_id":"3f0c2b1e-8a6d-4c55-9f0e-2d7c1b4a9e10","data":{"text":"step 1","value":0.5}}`

func BenchmarkAppendEvent(b *testing.B) {
	b.ReportAllocs()
	e := sentEvent{id: []byte("k3v9x2ab-17"), name: []byte("task_event"), data: []byte(benchData)}
	buf := appendEvent(nil, e)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		buf = appendEvent(buf[:0], e)
	}
}

func BenchmarkParseSend(b *testing.B) {
	for _, size := range []int{100, 64 << 10} {
		b.Run(fmt.Sprintf("data=%d", size), func(b *testing.B) {
			body := appendSend(nil, "3f0c2b1e-8a6d-4c55-9f0e-2d7c1b4a9e10", &event{ID: "k3v9x2ab-17", Name: "task_event", Data: strings.Repeat("x", size)}, false)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := parseSend(body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSend sends an event to each of 10,000 streams in turn, over a connection that stays open, and waits for each
// answer: the whole way through the gateway.
func BenchmarkSend(b *testing.B) {
	g := newGatewayFixture(b, "LOG_LEVEL=info", nil)
	var requests []string
	for _, token := range g.openMany(10000) {
		requests = append(requests, sendText("application/json", appendSend(nil, token, &event{ID: "k3v9x2ab-17", Name: "task_event", Data: benchData}, false)))
	}
	g.benchExchange(b, requests)
}

// BenchmarkSendBatch is BenchmarkSend with 100 events in a request.
func BenchmarkSendBatch(b *testing.B) {
	g := newGatewayFixture(b, "LOG_LEVEL=info", nil)
	var batch []byte
	for _, token := range g.openMany(100) {
		batch = append(batch, appendSend(nil, token, &event{ID: "k3v9x2ab-17", Name: "task_event", Data: benchData}, false)...)
		batch = append(batch, '\n')
	}
	g.benchExchange(b, []string{sendText("application/x-ndjson", batch)})
}

// BenchmarkGroupCommit sends from 64 goroutines, and from one, through a real gateway process to 1,000 clients: with a
// POST for each event, and in batches of what comes together.
func BenchmarkGroupCommit(b *testing.B) {
	for _, features := range []string{"", featureBatch} {
		for _, senders := range []int{1, 64} {
			b.Run(fmt.Sprintf("features=%s/senders=%d", features, senders), func(b *testing.B) {
				m, tokens := benchConns(b, features)
				events := []event{{ID: "k3v9x2ab-17", Name: "task_event", Data: benchData}}
				b.ReportAllocs()
				b.ResetTimer()
				benchEach(b, senders, func(i int) {
					token := tokens[i%len(tokens)]
					if r := m.Send(token, events, false); r.err != nil {
						b.Error(r.err)
					}
				})
			})
		}
	}
}

// BenchmarkLogs is BenchmarkGroupCommit with logs, so nobody waits for an answer. It ends when the gateway has taken
// all events.
func BenchmarkLogs(b *testing.B) {
	for _, features := range []string{"", featureBatch} {
		b.Run("features="+features, func(b *testing.B) {
			m, tokens := benchConns(b, features)
			policy := versionLike()
			logs := make([]*eventLog, len(tokens))
			for i, token := range tokens {
				logs[i] = newEventLog(&policy)
				follow(m, "task:"+token, connectRequest{token: token}, logs[i])
			}
			b.ReportAllocs()
			b.ResetTimer()
			benchEach(b, 64, func(i int) { logs[i%len(logs)].Append(benchData, false) })
			m.Drain(b.Context())
			for _, o := range logs {
				if o.given != o.last {
					b.Fatalf("a stream was given %d of %d events", o.given, o.last)
				}
			}
		})
	}
}

// benchConns connects 1,000 clients through a gateway process with these features.
func benchConns(b *testing.B, features string) (m *ConnectionManager, tokens []string) {
	backend := newStubBackend(b, nil)
	b.Cleanup(backend.server.Close)
	p := startOwnGateway(b, "CALLBACK_URL="+backend.server.URL+callbackTarget)
	g := &gatewayFixture{stubBackend: backend, t: b, addr: strings.TrimPrefix(p.URL, "http://")}
	client := newGatewayClient(p.URL)
	client.heard(parseFeatures(features))
	m = newConnectionManager(client, slog.New(slog.DiscardHandler), unreadMetrics())
	tokens = g.openMany(1000)
	for _, token := range tokens {
		connectToken(m, "task:"+token, token)
	}
	return m, tokens
}

// benchEach calls f for 1 to b.N, from this many goroutines.
func benchEach(b *testing.B, goroutines int, f func(i int)) {
	var next atomic.Int64
	var work sync.WaitGroup
	for range goroutines {
		work.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				f(int(i))
			}
		})
	}
	work.Wait()
}

// BenchmarkConnect measures the life of a stream, from the connection to its disconnect callback.
func BenchmarkConnect(b *testing.B) {
	g := newGatewayFixture(b, "LOG_LEVEL=info", nil)
	b.ReportAllocs()
	for b.Loop() {
		g.open("/api/sse/tasks?task_id=1", "User-Agent: benchmark", "Accept: text/event-stream").reset()
		receive(b, g.disconnects)
	}
}

// BenchmarkHeartbeatRound writes a heartbeat to each of 10,000 streams.
func BenchmarkHeartbeatRound(b *testing.B) {
	gateway, g := serveStreams(b, gatewayConfig{StreamBuffer: 1 << 20, WriteTimeout: 10 * time.Second, Retry: time.Second})
	g.openMany(10000)
	b.ReportAllocs()
	for b.Loop() {
		for i := range gateway.shards {
			for _, s := range gateway.shards[i].all() {
				s.beat()
			}
		}
	}
}

// openMany opens up to n streams and returns their tokens. The clients read whatever comes.
func (g *gatewayFixture) openMany(n int) (tokens []string) {
	var clients quietClients
	for range atMost(g.t, n) {
		c := g.open("/x")
		clients = append(clients, quiet(g.t, c.TCPConn))
		tokens = append(tokens, c.callback.Token)
	}
	go func() {
		for ; g.t.Context().Err() == nil; time.Sleep(100 * time.Millisecond) {
			clients.read(func([]byte) {})
		}
	}()
	return tokens
}

// atMost returns n, or less if there are not enough file descriptors for both ends of n connections.
func atMost(t testing.TB, n int) int {
	var limit syscall.Rlimit
	must(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	if most := int(limit.Cur/2) - 200; n > most {
		t.Logf("%d streams instead of %d: RLIMIT_NOFILE is %d", most, n, limit.Cur)
		return most
	}
	return n
}

// quietClients are sockets that only read looks at. Goroutines that wait for events would take as much CPU as the
// gateway does; browsers are on other machines.
type quietClients []int

// quiet returns a copy of the socket of a connection, and closes the connection.
func quiet(t testing.TB, conn *net.TCPConn) (fd int) {
	raw, err := conn.SyscallConn()
	must(t, err)
	raw.Control(func(polled uintptr) { fd, err = syscall.Dup(int(polled)) })
	must(t, err)
	conn.Close()
	t.Cleanup(func() { syscall.Close(fd) })
	return fd
}

// read passes on what has come to each client.
func (c quietClients) read(got func(text []byte)) {
	buf := make([]byte, 64<<10)
	for _, fd := range c {
		n, _, _ := syscall.Recvfrom(fd, buf, syscall.MSG_DONTWAIT)
		got(buf[:max(n, 0)])
	}
}

// benchExchange sends the requests in turn over one connection. Their answers must be equally long.
func (g *gatewayFixture) benchExchange(b *testing.B, requests []string) {
	conn := g.dial(requests[0])
	if got := conn.reply(); !strings.HasPrefix(got, sentOK) {
		b.Fatalf("got %s, want %s", got, sentOK)
	}
	conn.SetReadDeadline(time.Time{})
	conn.write(requests[0])
	conn.wire.Peek(1) // and with it comes the whole answer, which is written in one piece
	answer := make([]byte, conn.wire.Buffered())
	io.ReadFull(conn.wire, answer)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i = (i + 1) % len(requests)
		io.WriteString(conn, requests[i])
		if _, err := io.ReadFull(conn.wire, answer); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReports measures reports up to their answer, with a follower of each task: single reports of one worker and
// of 64, and one body with all of them as lines, in memory and with DATA_DIR. CPU is that of the process.
func BenchmarkReports(b *testing.B) {
	for _, env := range [][]string{nil, {"DATA_DIR"}} {
		for _, workers := range []int{1, 64, 0} {
			name := fmt.Sprintf("%v/workers=%d", env, workers)
			if workers == 0 {
				name = fmt.Sprintf("%v/lines", env)
			}
			b.Run(name, func(b *testing.B) {
				var settings []string
				for _, name := range env {
					settings = append(settings, name+"="+b.TempDir())
				}
				backend := startBackend(b, settings...)
				v := newVisitor(b, backend.URL, backend.URL)
				reports := make([]string, max(1, workers))
				for i := range reports {
					id := v.start("external", "{}")
					reports[i] = "/api/tasks/" + id + "/progress"
					resp, err := v.client.Get(v.streams + taskPath(id))
					must(b, err)
					b.Cleanup(func() { resp.Body.Close() })
					go io.Copy(io.Discard, resp.Body)
				}
				const report = `{"text":"a text as workers say it, of the usual length","value":0.5}`
				before := cpuSeconds(b, backend.pid())
				b.ResetTimer()
				if workers == 0 {
					body := strings.NewReader(strings.Repeat(report+"\n", b.N))
					resp, err := v.client.Post(v.api+reports[0], ndjson, body)
					must(b, err)
					if text, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
						b.Fatal(resp.Status, string(text))
					}
				}
				benchEach(b, workers, func(i int) {
					if got := v.post(reports[i%len(reports)], report); !strings.HasPrefix(got, "200 ") {
						b.Error(got)
					}
				})
				b.StopTimer()
				b.ReportMetric((cpuSeconds(b, backend.pid())-before)*1e6/float64(b.N), "cpu-us/op")
			})
		}
	}
}

// cpuSeconds returns the CPU time that a process has used so far.
func cpuSeconds(b *testing.B, pid int) float64 {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // proc(5): utime and stime are fields 14 and 15
	must(b, err)
	_, rest, _ := strings.Cut(string(stat), ") ")
	var user, system float64
	fields := strings.Fields(rest)
	fmt.Sscan(fields[11], &user)
	fmt.Sscan(fields[12], &system)
	return (user + system) / 100
}
