package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A postLoop serves a connection after its first send, and gives it back to net/http for any request that it does not
// know. Clients must not notice this: every request is answered as on a fresh connection.
func TestSendConnection(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	body := `{"token":"` + g.open("/x").callback.Token + `"}`
	sameAnswers(t, g.addr, "/internal/send", body, sentOK, func(text string) string { return text })
}

// The same holds for a connection that has brought a worker's report.
func TestReportConnection(t *testing.T) {
	t.Parallel()
	backend := startBackend(t, "API_TOKEN=k")
	addr := strings.TrimPrefix(backend.URL, "http://")
	const report = `{"text":"x","seq":1}`
	post := func(conn *streamClient, path, body string) {
		conn.write(fmt.Sprintf("POST %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"+
			"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body))
		conn.reply()
	}
	conn := dialTo(t, addr, "")
	post(conn, "/api/tasks", `{"type":"external","params":{"task_id":"a"}}`)
	post(conn, "/api/tasks/a/progress", report) // all later ones repeat it
	epochs := regexp.MustCompile(`"[0-9a-z]{8}-`)
	sameAnswers(t, addr, "/api/tasks/a/progress", report, `200 {"event_id":"-2","repeated":true}`, func(text string) string {
		return epochs.ReplaceAllString(text, `"-`)
	})

	v := newVisitor(t, backend.URL, backend.URL)
	counted := func() float64 { return scrapeValue(v.getText("/metrics"), `http_requests_total{code="2xx"}`) }
	before := counted()
	conn = dialTo(t, addr, "")
	for range 3 {
		post(conn, "/api/tasks/a/progress", report)
	}
	if got := counted() - before; got != 4 {
		t.Errorf("three reports and /metrics: counted %v answers, want 4", got)
	}
}

// sameAnswers compares the answers to requests on fresh connections with those on connections that have brought a plain
// request before. normal removes from an answer what differs by chance.
func sameAnswers(t *testing.T, addr, path, body, plainAnswer string, normal func(string) string) {
	t.Helper()
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	post := "POST " + path + " HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"
	const jsonType = "Content-Type: application/json\r\n"
	plain := post + jsonType + length + "\r\n" + body
	requests := []string{
		plain,
		post + strings.ToLower(jsonType+length) + "\r\n" + body,
		post + "content-LENGTH:" + strconv.Itoa(len(body)) + "\t\r\nCONTENT-type:\tApplication/Json \t;charset=utf-8\r\n\r\n" + body,
		post + jsonType + "Content-Length: 0\r\n\r\n",
		post + jsonType + "Content-Length: 2\r\n\r\n{}",
		post + jsonType + "Content-Length: 99999999999999999999\r\n\r\n",
		post + jsonType + "Content-Length: 262145\r\n\r\n" + strings.Repeat(" ", 256<<10+1),
		post + jsonType + "Content-Length: 1048577\r\n\r\n" + strings.Repeat(" ", 1<<20+1),
		post + jsonType + "\r\n",
		post + jsonType + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body),
		post + jsonType + "Transfer-Encoding: chunked\r\n\r\nz\r\n",
		strings.ReplaceAll(plain, "\r\n", "\n"),
		"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx",
		"GET /a%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"POST\r\n\r\n",
	}
	for _, header := range []string{
		"Connection: Keep-Alive\r\nUser-Agent: a:b\r\nX-Empty:", "Connection: close", "Expect: 100-continue",
		strings.TrimSpace(length), "Content-Length: 1", "Content-Type: text/plain", "Host: localhost", "Cookie: a=b",
		"no colon", ": x", "a(b: x", "User-Agent: a\x00b", "User-Agent: a\rb",
		"X: " + strings.Repeat("x", 32<<10), "User-Agent: " + strings.Repeat("x", 20<<10),
		"Origin: https://elsewhere.test", "Sec-Fetch-Site: cross-site",
	} {
		requests = append(requests, post+jsonType+length+header+"\r\n\r\n"+body)
	}
	for _, change := range [][2]string{
		{jsonType, ""}, {jsonType, jsonType + " folded: x\r\n"}, {jsonType, "Content-Type: text/plain\r\n" + jsonType},
		{"application/json", "text/plain"}, {"application/json", "application/x-ndjson"}, {"application/json", "Application/X-NDJSON; a=b"},
		{"application/json", "application/json;;"}, {"application/json", "application/json; a=b; a=c"},
		{length, "Content-Length: -1\r\n"}, {length, "Content-Length : 1\r\n"},
		{"Host: localhost\r\n", ""}, {"localhost", "a b"}, {"localhost", "[::1]:80"}, {"localhost", "elsewhere"},
		{"HTTP/1.1", "HTTP/1.0"}, {"POST", "PUT"}, {"POST", "post"},
		{path, path + "?x=1"}, {path, "http://h" + path}, {path, path + "/"}, {path, "/" + path}, {path, "/." + path},
		{path, strings.Replace(path, "s", "%73", 1)}, {"/a/", "/./"}, {"/a/", "/../"}, {"/a/", "//"}, {"/a/", "/unknown/"},
		{"/a/", "/" + strings.Repeat("a", 129) + "/"},
		{"Authorization: Bearer k\r\n", ""}, {"Bearer k", "bearer k"}, {"Bearer k", "Bearer K"}, {"Bearer k", "Basic k"},
		{"Bearer k", "Bearer k\r\nAuthorization: Bearer K"}, {"Bearer k", "Bearer K\r\nAuthorization: Bearer k"},
	} {
		requests = append(requests, strings.Replace(plain, change[0], change[1], 1))
	}
	for _, request := range requests {
		fresh, used := dialTo(t, addr, request), dialTo(t, addr, plain)
		if got := normal(used.reply()); got != plainAnswer {
			t.Fatalf("got %s, want %s", got, plainAnswer)
		}
		used.write(request)
		want, got := fresh.answer(), used.answer()
		wantText, _ := fresh.rest()
		gotText, _ := used.rest()
		gotType, wantType := got.Header.Get("Content-Type"), want.Header.Get("Content-Type")
		if got := got.Header.Get("Cache-Control"); wantType == "application/json" && got != "no-store" {
			t.Errorf("%.300q: got Cache-Control %q, want no-store", request, got)
		}
		if got.StatusCode != want.StatusCode || gotType != wantType || normal(gotText) != normal(wantText) || got.Close != want.Close {
			t.Errorf("%.300q: got %s %s %q, to be closed: %v; want %s %s %q, %v",
				request, got.Status, gotType, gotText, got.Close, want.Status, wantType, wantText, want.Close)
		}
	}
}

// What stands between two requests, and one that breaks off, are answered as on a connection that net/http has kept.
func TestSendConnectionBetweenRequests(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	plain := sendText("application/json", []byte(`{"token":"x"}`))
	other := strings.Replace(plain, "Host:", "X-Other: x\r\nHost:", 1)
	ask := func(first string, parts ...string) string {
		conn := g.dial(first)
		conn.wantReply(sentGone)
		for _, part := range parts {
			conn.write(strings.ReplaceAll(part, plain, first))
			time.Sleep(20 * time.Millisecond)
		}
		conn.CloseWrite()
		conn.SetReadDeadline(time.Now().Add(patience))
		text, err := io.ReadAll(conn.wire)
		return fmt.Sprint(regexp.MustCompile("(?m)^[CD].*\n").ReplaceAllString(string(text), ""), err)
	}
	for _, parts := range [][]string{
		{"\r\n" + plain},
		{"\n" + plain},
		{"\r\n\r\n", plain},
		{plain + "\r", "\n", plain + "\r\nGET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"},
		{"\r\n"},
		{plain[:10]},
		{plain[:60]},
		{plain[:len(plain)-1]},
		{plain + plain[:len(plain)-1]},
	} {
		if got, want := ask(plain, parts...), ask(other, parts...); got != want {
			t.Errorf("%q: got %q, want %q", parts, got, want)
		}
	}
}

// A request must be complete within postDue of its first byte, as with net/http. A silent connection has longer.
func TestSendConnectionTimes(t *testing.T) {
	t.Parallel()
	const pause = 9 * time.Second
	plain := sendText("application/json", []byte(`{"token":"x"}`))
	for _, tt := range []struct {
		name  string
		begun string // the start of the next request, sent with the one before
		next  string // the rest of it, sent a byte each pause
		least time.Duration
		most  time.Duration
	}{
		{"silent", "", "", postIdle - postIdleSlack, postIdle},
		{"dripping", "", plain, pause + postDue, pause + postDue},
		{"begun, then dripping", plain[:60], plain[60:], postDue, postDue},
		{"begun, then silent", plain[:60], "", postDue, postDue},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := newGateway(gatewayConfig{}, slog.New(slog.DiscardHandler), newRegistry("test"))
			ours, theirs := net.Pipe()
			go g.posts.serve(nil, ours, nil)
			answers := bufio.NewReader(theirs)
			ask := func(text string) {
				io.WriteString(theirs, text)
				if resp, err := http.ReadResponse(answers, nil); err != nil || resp.StatusCode != 404 {
					t.Fatalf("%s: got %v, %v, want an answer", tt.name, resp, err)
				} else {
					io.Copy(io.Discard, resp.Body)
				}
			}
			ask(plain)
			time.Sleep(postIdle - postIdleSlack - time.Second)
			io.WriteString(theirs, plain[:60])
			time.Sleep(postDue - time.Second)
			ask(plain[60:] + tt.begun)
			began := time.Now()
			var drip sync.WaitGroup
			drip.Go(func() {
				for _, c := range []byte(tt.next) {
					time.Sleep(pause)
					if _, err := theirs.Write([]byte{c}); err != nil {
						return
					}
				}
			})
			_, err := answers.ReadByte()
			if took := time.Since(began); err != io.EOF || took < tt.least || took > tt.most {
				t.Errorf("%s: got %v after %v, want the end after %v to %v", tt.name, err, took, tt.least, tt.most)
			}
			drip.Wait()
		})
	}
}

// Requests may come several at a time or in pieces, and a stream may follow them.
func TestSendConnectionPipelined(t *testing.T) {
	t.Parallel()
	const events = 200
	g := newGatewayFixture(t, "", nil)
	c := g.open("/x")
	var requests strings.Builder
	var want []string
	for i := range events {
		want = append(want, strconv.Itoa(i)+strings.Repeat("x", i*i%5000))
		requests.WriteString(sendText("application/json", appendSend(nil, c.callback.Token, &event{Data: want[i]}, false)))
	}
	requests.WriteString("GET /behind HTTP/1.1\r\nHost: h\r\n\r\n")
	var writer sync.WaitGroup
	t.Cleanup(writer.Wait)
	conn := g.dial("")
	writer.Go(func() {
		random := rand.New(rand.NewPCG(3, 4))
		for text := requests.String(); text != ""; {
			n := min(len(text), 1+random.IntN(1<<random.IntN(15)))
			conn.write(text[:n])
			text = text[n:]
		}
	})
	for i := range events {
		if got := conn.reply(); got != sentOK {
			t.Fatalf("answer %d: got %s, want %s", i, got, sentOK)
		}
	}
	writer.Wait()
	c.wantData(want...)
	g.asked(conn).begin()
	g.wantLive(conn)
}

// A head that announces a large body must not take the memory for it before the body comes.
func TestSendBufferGrowsWithTheRequest(t *testing.T) {
	for _, size := range []int{1, postBuffer, 64<<10 + 1, postBufferMax, postBufferMax + 1, maxBatch + 200} {
		var sent, buf []byte
		for len(buf) < size {
			if buf = growBuffer(buf, size); len(buf) == cap(buf) {
				t.Fatalf("%d bytes of %d: no room for more", len(buf), size)
			}
			if most := max(postBufferMax, 3*len(buf)); cap(buf) > most {
				t.Fatalf("%d bytes of %d: room for %d, want at most %d", len(buf), size, cap(buf), most)
			}
			more := bytes.Repeat([]byte{byte(len(sent) >> 10)}, min(cap(buf), size)-len(buf)) // at most one read
			buf, sent = append(buf, more...), append(sent, more...)
		}
		if !bytes.Equal(buf, sent) {
			t.Errorf("%d bytes are not what was sent", size)
		}
	}
}

// A heldLoop is a postLoop with one connection, a pipe. Its requests are answered when the test says so.
type heldLoop struct {
	*postLoop
	heldPoster
	net.Conn              // the client's end
	room     atomic.Int64 // how much the next Read of the other may take
}

// heldConn is the other end.
type heldConn struct {
	net.Conn
	room *atomic.Int64
}

func (c heldConn) Read(b []byte) (int, error) {
	c.room.Store(int64(len(b)))
	return c.Conn.Read(b)
}

// heldPoster answers when the test says so.
type heldPoster struct{ asked, answered chan struct{} }

func (heldPoster) plainLimit(plainPost) int64 { return maxSend }

func (h heldPoster) answerPlain(text []byte, _ plainPost, _ []byte) (int, []byte) {
	h.asked <- struct{}{}
	<-h.answered
	return http.StatusOK, text
}

// testHeld runs a test in a bubble, with a loop that has read text from its connection.
func testHeld(t *testing.T, text string, test func(t *testing.T, h *heldLoop)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &heldLoop{heldPoster: heldPoster{make(chan struct{}), make(chan struct{})}}
		h.postLoop = &postLoop{poster: h.heldPoster}
		ours, theirs := net.Pipe()
		defer theirs.Close()
		h.Conn = theirs
		go h.serve(nil, heldConn{ours, &h.room}, []byte(text))
		test(t, h)
	})
}

// A connection that has brought much keeps little of it while it is silent, if there are many.
func TestSendBufferShrinks(t *testing.T) {
	testHeld(t, "", func(t *testing.T, h *heldLoop) {
		h.open.Add(1000)
		for _, size := range []int{2, 20 << 10, 40 << 10, 250 << 10, 1 << 20, 250 << 10} {
			go io.WriteString(h, sendText(jsonType, make([]byte, size)))
			<-h.asked
			h.answered <- struct{}{}
			h.Read(make([]byte, 1<<10))
			synctest.Wait()
			if got := h.room.Load(); got > 64<<10 {
				t.Errorf("after %d bytes: got room for %d, want at most 64 KiB", size, got)
			}
		}
	})
}

// A request that is taken for plain means the same to net/http, so nothing in front of the two can tell them apart.
func FuzzPlainPost(f *testing.F) {
	head := "POST /api/tasks/a/progress HTTP/1.1\r\nHost: h:1\r\nAuthorization: Bearer k\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
	f.Add([]byte(head + "\r\n{}"))
	f.Add([]byte(head + "User-Agent: \t a \t \r\nconnection: Keep-Alive\r\n\r\n{}POST"))
	f.Add([]byte(head + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"))
	f.Add([]byte(strings.Replace(head, "json", "x-ndjson", 1) + " folded: x\r\n\r\n{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, plain := parsePlain(text)
		if !plain || p.size == 0 || len(text) < p.size {
			return
		}
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(text)))
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || !bytes.Equal(body, text[p.head:p.size]) {
			t.Errorf("%q: got body %q, want %q, %v", text, text[p.head:p.size], body, err)
		}
		got := []string{string(p.path), string(p.host), string(p.authorization), p.mediaType}
		want := []string{r.URL.EscapedPath(), r.Host, r.Header.Get("Authorization"), r.Header.Get("Content-Type")}
		if !slices.Equal(got, want) || !isPlain(r, p.mediaType) {
			t.Errorf("%q: got %q, want %q; isPlain: %v, want true", text, got, want, isPlain(r, p.mediaType))
		}
	})
}

// A connection is taken over only if its next requests will be plain, too: otherwise it would go to and fro.
func TestPlainOnBothSides(t *testing.T) {
	t.Parallel()
	const text = "POST /internal/send HTTP/1.1\r\nHost: gateway:3000\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"
	for old, changed := range map[string]string{
		"HTTP":     "HTTP",
		"gateway":  "sse_gateway",
		"send":     "send?",
		"send ":    "send?a=b ",
		"POST ":    "POST http://gateway:3000",
		"\r\n\r\n": "\r\nConnection: close\r\n\r\n",
		"Host":     "X-Other: x\r\nHost",
	} {
		request := strings.Replace(text, old, changed, 1)
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(request)))
		must(t, err)
		_, plain := parsePlain([]byte(request))
		if want := strings.HasPrefix(changed, "HTTP") || changed == "sse_gateway"; isPlain(r, jsonType) != want || plain != want {
			t.Errorf("%q: got %v from net/http and %v afterwards, want %v", request, isPlain(r, jsonType), plain, want)
		}
	}
}

// During a shutdown net/http answers all requests. The shutdown waits for the answers that are under way.
func TestReportConnectionsDuringShutdown(t *testing.T) {
	apiTest(t, "", func(t *testing.T, api *apiFixture) {
		api.do("POST", "/api/tasks", `{"type":"external","params":{"task_id":"a"}}`)
		p := plainPost{path: []byte("/api/tasks/a/progress"), host: []byte("localhost"), mediaType: jsonType}
		report := func() int {
			status, _ := api.answerPlain(nil, p, []byte(`{"text":"x"}`))
			return status
		}
		if got := report(); got != http.StatusOK {
			t.Errorf("got %d, want 200", got)
		}
		waitsForPosts(t, api.reports, api.stop, func() {
			if got := report(); got != 0 {
				t.Errorf("in a shutdown: got %d, want 0", got)
			}
		})
	})
}

// waitsForPosts checks that a shutdown waits for the posts that a loop answers. It calls meanwhile during the wait.
func waitsForPosts(t *testing.T, l *postLoop, shutdown func(context.Context), meanwhile func()) {
	t.Helper()
	l.busy.Add(1)
	stopped := make(chan struct{})
	go func() {
		shutdown(t.Context())
		close(stopped)
	}()
	time.Sleep(drainLimit / 2)
	synctest.Wait()
	select {
	case <-stopped:
		t.Error("stopped while a post was being answered")
	default:
	}
	meanwhile()
	l.busy.Add(-1)
	<-stopped
}

// So it is with a gateway's: its shutdown waits for the sends that are under way, and net/http has the next.
func TestSendConnectionsDuringShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(gatewayConfig{}, slog.New(slog.DiscardHandler), newRegistry("test"))
		p := plainPost{path: []byte("/internal/send"), mediaType: jsonType}
		if got := g.plainLimit(p); got != maxSend {
			t.Errorf("got a limit of %d, want %d", got, maxSend)
		}
		waitsForPosts(t, g.posts, g.shutdown, func() {
			if got := g.plainLimit(p); got >= 0 {
				t.Errorf("in a shutdown: got a limit of %d, want none", got)
			}
		})
	})
}

// A request counts as under way until its answer has been written.
func TestPlainPostsAreTracked(t *testing.T) {
	testHeld(t, sendText(jsonType, nil), func(t *testing.T, h *heldLoop) {
		<-h.asked
		h.answered <- struct{}{}
		synctest.Wait() // it writes
		if got := h.busy.Load(); got != 1 {
			t.Errorf("got %d under way, want 1", got)
		}
		h.Read(make([]byte, 1<<10))
		synctest.Wait()
		if got := h.busy.Load(); got != 0 {
			t.Errorf("after the answer: got %d under way, want 0", got)
		}
	})
}

// An answer has time to be made and written, however late its request came.
func TestPlainPostsThatComeLate(t *testing.T) {
	text := sendText(jsonType, []byte("{}"))
	testHeld(t, "", func(t *testing.T, h *heldLoop) {
		answers := bufio.NewReader(h)
		ask := func(name, text string) {
			io.WriteString(h, text)
			<-h.asked
			time.Sleep(2 * time.Second)
			h.answered <- struct{}{}
			if _, err := http.ReadResponse(answers, nil); err != nil {
				t.Fatalf("%s: got %v, want an answer", name, err)
			}
		}
		ask("the first", text)
		time.Sleep(postIdle - 3*time.Second)
		ask("after a silence", text)
		io.WriteString(h, text[:60])
		time.Sleep(postDue - time.Second)
		ask("in parts", text[60:])
	})
}

// Nor is a connection forgotten on its way back, with a request that has been read.
func TestPlainPostsGoBackTracked(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "localhost:0")
	must(t, err)
	defer listener.Close()
	client := dialTo(t, listener.Addr().String(), "")
	conn, err := listener.Accept()
	must(t, err)
	l, tracked := &postLoop{poster: heldPoster{}}, make(chan int64, 1)
	server := &http.Server{Handler: http.NotFoundHandler(), ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			tracked <- l.busy.Load()
		}
	}}
	defer server.Close()
	go l.serve(server, conn, []byte("GET / HTTP/1.1\r\nHost: h\r\n\r\n"))
	if got := receive(t, tracked); got != 1 {
		t.Errorf("got %d under way when net/http took it, want 1", got)
	}
	if got := client.answer().StatusCode; got != http.StatusNotFound {
		t.Errorf("got status %d, want 404", got)
	}
	eventually(t, soon, "the connection has left", func() bool { return l.busy.Load() == 0 })

	server.Close() // from now on nobody takes any
	client = dialTo(t, listener.Addr().String(), "")
	conn, err = listener.Accept()
	must(t, err)
	l.serve(server, conn, []byte("GET / HTTP/1.1\r\nHost: h\r\n\r\n"))
	client.SetReadDeadline(time.Now().Add(patience))
	if _, err := client.wire.ReadByte(); err != io.EOF {
		t.Errorf("got %v after the end, want %v", err, io.EOF)
	}
}

// Requests of which only every other one is plain stay with net/http for the most part.
func TestPlainPostsAmongOthers(t *testing.T) {
	t.Parallel()
	l := &postLoop{poster: heldPoster{}}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l.respond(w, r, jsonType, http.StatusOK, nil)
	}))
	var taken atomic.Int64
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateHijacked {
			taken.Add(1)
		}
	}
	server.Config.ConnContext = withConn
	server.Start()
	t.Cleanup(server.Close)
	conn := dialTo(t, server.Listener.Addr().String(), "")
	for range 40 {
		conn.write(sendText(jsonType, nil))
		conn.wantReply("200 ")
		conn.write("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		conn.wantReply("200 ")
	}
	if got := taken.Load(); got < 2 || got > 5 {
		t.Errorf("the connection was taken over %d times in 80 requests, want 2 to 5", got)
	}
}

// closingPoster may be in a shutdown.
type closingPoster struct {
	heldPoster
	atomic.Bool
}

func (p *closingPoster) plainLimit(plainPost) int64 {
	if p.Load() {
		return -1
	}
	return maxSend
}

// In a shutdown net/http writes the answers that are still to come: it waits for them, and tells of the end.
func TestPlainPostsAtTheEnd(t *testing.T) {
	t.Parallel()
	closing := &closingPoster{}
	l := &postLoop{poster: closing}
	asked, answer := make(chan struct{}), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(asked)
		<-answer
		l.respond(w, r, jsonType, http.StatusOK, nil)
	}))
	conn := dialTo(t, server.Listener.Addr().String(), sendText(jsonType, nil))
	<-asked
	closing.Store(true)
	stopped := make(chan error)
	go func() { stopped <- server.Config.Shutdown(t.Context()) }()
	none := make(oneConn)
	close(none)
	eventually(t, soon, "the shutdown has begun", func() bool { return server.Config.Serve(none) == http.ErrServerClosed })
	close(answer)
	if got := conn.answer(); !got.Close {
		t.Error("got an answer after which the connection stays open, want one that ends it")
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}
