package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A gatewayTest is a client of a gateway that answers each POST in the same way. No error may reveal the path /hush in
// its URL.
type gatewayTest struct {
	*gatewayClient
	status int
	body   string          // with status 0, all that goes over the wire
	got    []string        // "POST /hush/internal/send application/json {…}"
	from   map[string]bool // the addresses of its connections
}

func newGatewayTest(t *testing.T) *gatewayTest {
	g := &gatewayTest{status: http.StatusOK, body: batchOK, from: map[string]bool{}}
	server := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		g.got = append(g.got, strings.Join([]string{r.Method, r.RequestURI, r.Header.Get("Content-Type"), string(body)}, " "))
		g.from[r.RemoteAddr] = true
		if g.status == 0 {
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, g.body)
			conn.Close()
			return
		}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(g.status)
		io.WriteString(w, g.body)
	}))
	g.gatewayClient = newGatewayClient(server.URL + "/hush")
	t.Cleanup(g.transport.(*http.Transport).CloseIdleConnections)
	return g
}

func TestGatewayClientWire(t *testing.T) {
	t.Parallel()
	g := newGatewayTest(t)
	for _, test := range []struct {
		events []event
		end    bool
		want   string
	}{
		{nil, false, `{"token":"t"}`},
		{nil, true, `{"token":"t","close":true}`},
		{[]event{{}}, false, `{"token":"t","event":{"data":""}}`},
		{[]event{{Name: "error", Data: "é\n"}}, false, `{"token":"t","event":{"data":"é\n","name":"error"}}`},
		{[]event{{ID: "x-1", Name: "version", Data: `{"<&>":1}`}}, true,
			`{"token":"t","event":{"data":"{\"<&>\":1}","id":"x-1","name":"version"},"close":true}`},
	} {
		g.got = nil
		r := g.send("t", test.events, test.end)
		if want := "POST /hush/internal/send application/json " + test.want; r.err != nil || !slices.Equal(g.got, []string{want}) {
			t.Errorf("got  %q, %v\nwant %q", g.got, r.err, want)
		}
	}
}

// A proxy in between may answer in the gateway's place. So an answer counts only if it has the gateway's own words. If
// the gateway is of another make, any words will do.
func TestGatewayClientAnswers(t *testing.T) {
	t.Parallel()
	g := newGatewayTest(t)
	const ours, another = "batch, id, retry, heartbeat", ""
	for _, test := range []struct {
		features string
		status   int
		body     string
		want     string // taken, refused, buffered, and the beginning of the error
	}{
		{another, 200, `{"status":"ok"}`, "1 0 false <nil>"},
		{another, 200, `{"status":"buffered"}`, "1 0 true <nil>"},
		{another, 200, "", "1 0 false <nil>"},
		{another, 302, "", "0 0 false posting to the gateway: status 302"},
		{another, 307, "", "0 0 false posting to the gateway: status 307"}, // an http.Client would POST again
		{another, 500, strings.Repeat("x", 1<<20), "0 0 false posting to the gateway: status 500"},
		{another, 503, "", "0 0 false posting to the gateway: status 503"},
		{ours, 200, `{"status":"ok"}` + "\n", "1 0 false <nil>"},
		{ours, 200, `{"status":"buffered"}` + "\n", "1 0 true <nil>"},
		{ours, 200, `{ "status": "buffered" }`, "1 0 true <nil>"},
		{ours, 200, "<h1>Back soon</h1>", "0 0 false reading the answer: \"<h1>Back"},
		{ours, 200, `{"error":"back soon"}`, "0 0 false reading the answer: "},
		{ours, 200, "", "0 0 false reading the answer: "},
		{ours, 408, `{"error":"request body broke off","code":"broken_off"}`, "0 0 false posting to the gateway: status 408"},
		{ours, 404, `{"error":"unknown token"}`, "0 0 false unknown token"},
		{ours, 404, "404 page not found", "0 0 false the gateway at "},
		{ours, 404, `{"error":"not found"}`, "0 0 false the gateway at "},
		{ours, 405, "", "0 0 false the gateway at "},
		{another, 404, "Cannot POST", "0 0 false unknown token"},
		{ours, 413, `{"error":"request body too large"}`, "1 1 false <nil>"},
		{ours, 400, `{"error":"event data is missing"}`, "1 1 false <nil>"},
		{ours, 413, "<h1>413</h1>", "0 0 false posting to the gateway: status 413"},
		{another, 413, "PayloadTooLargeError", "1 1 false <nil>"},
		{another, 400, `{"status":"buffered"}`, "1 1 false <nil>"},
	} {
		g.heard(parseFeatures(test.features))
		g.status, g.body, g.got = test.status, test.body, nil
		events := []event{{Data: "data"}}
		r := g.send("t", events, false)
		got, unknown := fmt.Sprint(r.taken, " ", r.refused, " ", r.buffered, " ", r.err), strings.HasSuffix(test.want, "unknown token")
		if !strings.HasPrefix(got, test.want) || errors.Is(r.err, errUnknownToken) != unknown || len(g.got) != 1 {
			t.Errorf("%q: %d %.30q: got %s after %d requests, want %s after 1", test.features, test.status, test.body, got, len(g.got), test.want)
		}
		probe, end := g.send("t", nil, false), g.send("t", events, true) // these are never skipped
		if test.status != 200 && (probe.err == nil || end.err == nil) {
			t.Errorf("%d: got %v for a probe and %v for an end, want errors", test.status, probe.err, end.err)
		}
	}
}

// Nobody knows what became of a failed send, so it must not be tried again. Its error must not reveal the URL.
func TestGatewayClientFailures(t *testing.T) {
	t.Parallel()
	g := newGatewayTest(t)
	fails := func(what, answer string, wantRequests int) error {
		t.Helper()
		g.status, g.body, g.got = 0, answer, nil
		r := g.send("t", []event{{Data: "data"}}, false)
		switch {
		case r.err == nil || r.taken > 0 || r.buffered || errors.Is(r.err, errUnknownToken):
			t.Errorf("%s: got %+v", what, r)
		case strings.Contains(r.err.Error(), "hush") || strings.Contains(r.err.Error(), "http://"):
			t.Errorf("%s: got the URL in %v", what, r.err)
		}
		if len(g.got) != wantRequests {
			t.Errorf("%s: got %d requests, want %d", what, len(g.got), wantRequests)
		}
		return r.err
	}
	fails("no answer", "", 1)
	fails("no HTTP", "nonsense", 1)
	for _, echo := range []string{
		"POST /hush/internal/send HTTP/1.1\r\n\r\n",
		"HTTP/1.1 200 OK\r\n/hush/internal/send\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: /hush/internal/send\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: /hush/internal/send\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n/hush/internal/send\r\n\r\n",
	} {
		fails("an echo", echo, 1)
	}
	fails("half an answer", "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n"+`{"status":"buffered"`[:19], 1)
	// What follows a 101 would have no end, and no time limit of the client applies to it.
	err := fails("a change of protocol", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", 1)
	if !strings.Contains(fmt.Sprint(err), "change of protocol") {
		t.Errorf("got %v, want an unasked change of protocol", err)
	}
	g.url = "http://127.0.0.1:0/hush"
	fails("no gateway", "", 0)
	g.url = "http://hush\x7f"
	fails("no URL", "", 0)

	certificate := &tls.CertificateVerificationError{Err: errors.New(`signed by "nobody"`)}
	if got := withoutSecrets(&url.Error{Op: "Post", URL: g.url, Err: certificate}); got != error(certificate) {
		t.Errorf("got %v, want %v", got, certificate)
	}
}

// pipedClient returns a client whose one connection is a pipe to far. In a bubble its time is that of the bubble.
func pipedClient(baseURL string) (c *gatewayClient, far net.Conn) {
	near, far := net.Pipe()
	c = newGatewayClient(baseURL)
	c.transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) { return near, nil }
	return c, far
}

// The limit is for the whole answer, not for its beginning.
func TestGatewayClientLimit(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"no answer":     "",
		"half a header": "HTTP/1.1 200 OK\r\nContent-",
		"half a body":   "HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, far := pipedClient("http://hush")
				go func() {
					r, err := http.ReadRequest(bufio.NewReader(far))
					if err != nil {
						t.Error(err)
						return
					}
					io.Copy(io.Discard, r.Body)
					io.WriteString(far, answer)
					io.Copy(io.Discard, far) // until the client gives up
				}()
				start := time.Now()
				err := c.send("t", nil, false).err
				if got := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || got != sendLimit {
					t.Errorf("got %v after %s, want %v after %s", err, got, context.DeadlineExceeded, sendLimit)
				}
				if strings.Contains(err.Error(), "hush") {
					t.Errorf("got the URL in %v", err)
				}
			})
		})
	}
}

// A Transport keeps connecting when its request has ended, so connecting needs a limit of its own.
func TestGatewayClientConnectLimit(t *testing.T) {
	t.Run("handshake", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			c, far := pipedClient("https://hush")
			go c.send("t", nil, false)
			start := time.Now()
			io.Copy(io.Discard, far) // until the client gives up
			if got := time.Since(start); got > dialLimit {
				t.Errorf("the connection was open for %s, want at most %s", got, dialLimit)
			}
		})
	})
	t.Run("dial", func(t *testing.T) {
		t.Parallel()
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		must(t, err)
		defer syscall.Close(fd)
		if err = syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err == nil {
			err = syscall.Listen(fd, 0)
		}
		addr, nameErr := syscall.Getsockname(fd)
		must(t, errors.Join(err, nameErr))
		target := fmt.Sprint("127.0.0.1:", addr.(*syscall.SockaddrInet4).Port)
		for start := time.Now(); ; start = time.Now() { // until the queue of connections that nobody accepts is full
			conn, err := dial(context.Background(), "tcp", target)
			if err != nil {
				if got := time.Since(start); got < dialLimit || got > 2*dialLimit {
					t.Errorf("got %v after %s, want a timeout after %s", err, got, dialLimit)
				}
				return
			}
			defer conn.Close()
		}
	})
}

// Answers are read to their end. Otherwise every event would cost a new connection.
func TestGatewayClientReusesItsConnection(t *testing.T) {
	t.Parallel()
	g := newGatewayTest(t)
	g.body = strings.Repeat("x", 8192) // in chunks, because more than net/http buffers
	for _, g.status = range []int{200, 404, 500, 302, 200} {
		g.send("t", nil, false)
	}
	if len(g.from) != 1 {
		t.Errorf("got %d connections, want 1", len(g.from))
	}
}

// postTest is a gatewayClient in a synctest bubble. Each of its POSTs waits for the test to answer it.
type postTest struct {
	*testing.T
	client *gatewayClient
	posts  chan *steppedPost // in their order
}

type steppedPost struct {
	text   string // media type and body
	answer chan steppedPostAnswer
}

type steppedPostAnswer struct {
	status int
	body   string
	err    error
}

func testPosts(t *testing.T, f func(t *postTest)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := &postTest{t, newGatewayClient("http://hush"), make(chan *steppedPost, 2*maxPosting)}
		p.client.transport = p
		f(p)
	})
}

// RoundTrip makes a postTest the network.
func (t *postTest) RoundTrip(r *http.Request) (*http.Response, error) {
	body, _ := io.ReadAll(r.Body)
	p := &steppedPost{r.Header.Get("Content-Type") + " " + string(body), make(chan steppedPostAnswer)}
	t.posts <- p
	a := <-p.answer
	if a.err != nil {
		return nil, a.err
	}
	return &http.Response{StatusCode: a.status, Body: io.NopCloser(strings.NewReader(a.body))}, nil
}

// send begins a send of events, or a probe if there are none. Its result, "taken buffered error", is in the channel.
func (t *postTest) send(token string, events ...event) <-chan string {
	result := make(chan string, 1)
	go func() {
		r := t.client.send(token, events, false)
		result <- fmt.Sprint(r.taken, " ", r.buffered, " ", r.err)
	}()
	synctest.Wait()
	return result
}

// single and batch return the POSTs that probe one stream or several.
func single(token string) string { return `application/json {"token":"` + token + `"}` }

func batch(tokens ...string) string {
	return `application/x-ndjson {"token":"` + strings.Join(tokens, "\"}\n{\"token\":\"") + "\"}\n"
}

// next returns the oldest POST that the test has not seen yet, and checks that it is want.
func (t *postTest) next(want string) *steppedPost {
	t.Helper()
	select {
	case p := <-t.posts:
		if p.text != want {
			t.Errorf("got POST %.200q, want %.200q", p.text, want)
		}
		return p
	default:
		t.Fatalf("nothing under way, want %.200q", want)
		return nil
	}
}

// wantNone checks that no other POST is under way.
func (t *postTest) wantNone() {
	t.Helper()
	if n := len(t.posts); n > 0 {
		t.Errorf("got %d more POSTs, the first is %.200q", n, (<-t.posts).text)
	}
}

func (t *postTest) reply(p *steppedPost, status int, body string) {
	p.answer <- steppedPostAnswer{status, body, nil}
	synctest.Wait()
}

// finish answers POSTs that the test does not care about.
func (t *postTest) finish(posts []*steppedPost) {
	for _, p := range posts {
		t.reply(p, 200, "")
	}
}

func (t *postTest) wantResult(result <-chan string, want string) {
	t.Helper()
	if got := <-result; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestGatewayClientBoundsItsPosts(t *testing.T) {
	testPosts(t, func(t *postTest) {
		for range 2*maxPosting + 1 {
			t.send("t")
		}
		for _, want := range []int{maxPosting, maxPosting, 1} {
			if got := len(t.posts); got != want {
				t.Errorf("got %d POSTs under way, want %d", got, want)
			}
			for range want {
				t.reply(t.next(single("t")), 200, "")
			}
		}
		last := t.send("t") // by now all others are done
		t.reply(t.next(single("t")), 200, "")
		t.wantResult(last, "1 false <nil>")
		for _, s := range t.client.waiting[:cap(t.client.waiting)] {
			if s != nil {
				t.Fatal("a send that is over is still in memory")
			}
		}
	})
}

// The gateway may not be running or reachable when the backend starts. The reset is tried until the gateway answers.
func TestGatewayClientResets(t *testing.T) {
	testPosts(t, func(t *postTest) {
		const post = "application/json {}"
		var log bytes.Buffer
		returned := make(chan bool)
		go func() {
			t.client.reset(t.Context(), "", slog.New(slog.NewTextHandler(&log, nil)))
			close(returned)
		}()
		synctest.Wait()
		t.next(post).answer <- steppedPostAnswer{err: errors.New("refused")}
		<-returned
		for _, answer := range []steppedPostAnswer{
			{status: 503}, {status: 404, body: "404 page not found"}, {status: 200, body: "<p>Hello"}, // a proxy's
			{status: 404, body: `{"error":"not found"}`}, {status: 401}, // a gateway's other address, a proxy's login
			{status: 401, body: `{"error":"missing or wrong secret"}`},
		} {
			time.Sleep(resetPause)
			synctest.Wait()
			t.reply(t.next(post), answer.status, answer.body)
		}
		time.Sleep(time.Minute)
		t.wantNone()
		want := `level=WARN msg="the gateway does not answer yet" err=refused
level=WARN msg="the gateway has another callback secret: is SSE_CALLBACK_SECRET the one in its CALLBACK_URL?"
level=INFO msg="the gateway answers now"
`
		if got := regexp.MustCompile(`(?m)^time=\S+ `).ReplaceAllString(log.String(), ""); got != want {
			t.Errorf("got log\n%s\nwant\n%s", got, want)
		}
	})
}

// A gateway that is too slow for the first try gets more time for the next. Each reset ends all of its streams, so a
// gateway that is always slow would otherwise lose them once a second.
func TestGatewayClientResetsASlowGateway(t *testing.T) {
	testPosts(t, func(t *postTest) {
		tried, answered := 0, 0
		t.client.transport = slowGateway(func(ctx context.Context) error {
			tried++
			select {
			case <-time.After(2 * time.Second):
				answered++
			case <-ctx.Done():
			}
			return ctx.Err()
		})
		t.client.reset(t.Context(), "", slog.New(slog.DiscardHandler))
		time.Sleep(time.Minute)
		synctest.Wait()
		if tried != 2 || answered != 1 {
			t.Errorf("%d resets were tried and %d answered, want 2 and 1", tried, answered)
		}
	})
}

// A gateway that announces no features does not know resets, so it is not asked again.
func TestGatewayClientDoesNotResetForeignGateways(t *testing.T) {
	testPosts(t, func(t *postTest) {
		tried := 0
		t.client.transport = slowGateway(func(context.Context) error {
			tried++
			return errors.New("404")
		})
		t.client.reset(t.Context(), "", slog.New(slog.DiscardHandler))
		time.Sleep(resetPause * 3 / 2)
		t.client.heard(features{})
		time.Sleep(time.Minute)
		synctest.Wait()
		if tried != 2 {
			t.Errorf("tried %d times, want 2", tried)
		}
	})
}

// A slowGateway is called for each request, and answers 200 if it returns nil.
type slowGateway func(context.Context) error

func (wait slowGateway) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := wait(r.Context()); err != nil {
		return nil, err
	}
	header := http.Header{"Content-Type": {"application/json"}}
	return &http.Response{StatusCode: http.StatusOK, Header: header, Body: io.NopCloser(strings.NewReader(`{"status":"ok"}`))}, nil
}

// beBusy keeps the client busy: further sends wait until one of the returned POSTs is answered.
func (t *postTest) beBusy() (busy [maxPostingBatches]*steppedPost) {
	t.client.heard(features{known: true, batch: true})
	for i := range busy {
		t.send("busy")
		busy[i] = t.next(single("busy"))
	}
	return busy
}

// Sends that come while the client is busy go out in the next POST together, and each gets its own result.
func TestGatewayClientBatches(t *testing.T) {
	testPosts(t, func(t *postTest) {
		busy := t.beBusy()
		results := map[string]<-chan string{}
		for _, token := range []string{"c", "d", "e", "f"} {
			results[token] = t.send(token)
		}
		t.wantNone()
		t.reply(busy[0], 404, "")
		rest := t.next(batch("c", "d", "e", "f"))
		g := t.send("g")
		t.reply(rest, 200, `{"status":"ok"}
{"status":"buffered"}
{"status":404}
{"status":400,"error":"no"}
`)
		t.wantResult(results["c"], "1 false <nil>")
		t.wantResult(results["d"], "1 true <nil>")
		t.wantResult(results["e"], "0 false unknown token")
		t.wantResult(results["f"], `0 false reading the answer: "{\"status\":400,\"error\":\"no\"}"`)
		t.reply(t.next(single("g")), 200, `{"status":"buffered"}`)
		t.wantResult(g, "1 true <nil>")
		t.finish(busy[1:])
		t.wantNone()
	})
}

// Several events for one stream are lines of one batch, which may have other sends too. Without batches only the first
// event is sent.
func TestGatewayClientSendsRuns(t *testing.T) {
	testPosts(t, func(t *postTest) {
		run := []event{{Data: "1"}, {Data: "2"}}
		line := func(token, data string) string { return fmt.Sprintf(`{"token":%q,"event":{"data":%q}}`, token, data) }
		runs := func(tokens ...string) string {
			text := "application/x-ndjson "
			for _, token := range tokens {
				text += line(token, "1") + "\n" + line(token, "2") + "\n"
			}
			return text
		}
		a := t.send("a", run...)
		t.reply(t.next("application/json "+line("a", "1")), 200, "")
		t.wantResult(a, "1 false <nil>")

		t.client.heard(features{known: true, batch: true})
		a = t.send("a", run...)
		t.reply(t.next(runs("a")), 200, `{"status":"buffered"}`+"\n"+`{"status": "ok"}`)
		t.wantResult(a, "2 false <nil>")

		busy := t.beBusy()
		a, b, c := t.send("a", run...), t.send("b", run...), t.send("c", run...)
		t.reply(busy[0], 200, "")
		t.reply(t.next(runs("a", "b", "c")), 200, `{"status":"ok"}
{"status":"buffered"}
{"status":"ok"}
{"status":404}
{"status":413}
{"status":"ok"}
`)
		t.wantResult(a, "2 true <nil>")
		t.wantResult(b, "1 false unknown token")
		t.wantResult(c, "2 false <nil>") // the event that was refused for good is skipped

		t.send("busy")
		busy[0] = t.next(single("busy"))
		a = t.send("a", run...)
		t.client.heard(features{}) // another gateway calls back while a waits for the one that is gone
		t.reply(busy[0], 200, "")
		t.reply(t.next(runs("a")), 415, "")
		t.wantResult(a, "0 false posting to the gateway: status 415")
		a = t.send("a", run...)
		t.reply(t.next("application/json "+line("a", "1")), 404, "")
		t.wantResult(a, "0 false unknown token")
		t.finish(busy[1:])
	})
}

// If a batch fails, nobody knows what became of any of its sends.
func TestGatewayClientBatchFailures(t *testing.T) {
	for name, test := range map[string]struct {
		answer steppedPostAnswer
		want   string
	}{
		"no answer":        {steppedPostAnswer{err: errNoAnswer}, "0 false no answer"},
		"another gateway":  {steppedPostAnswer{status: 415}, "0 false posting to the gateway: status 415"},
		"no such path":     {steppedPostAnswer{status: 404}, "0 false the gateway at http://hush does not serve /internal/send: is INTERNAL_ADDR set there?"},
		"too few results":  {steppedPostAnswer{status: 200, body: "1\n"}, "0 false reading the answer: 1 results to a batch of 2"},
		"too many results": {steppedPostAnswer{status: 200, body: "1\n2\n3\n"}, "0 false reading the answer: 3 results to a batch of 2"},
	} {
		t.Run(name, func(t *testing.T) {
			testPosts(t, func(t *postTest) {
				busy := t.beBusy()
				c, d := t.send("c"), t.send("d")
				t.reply(busy[0], 200, "")
				t.next(batch("c", "d")).answer <- test.answer
				t.wantResult(c, test.want)
				t.wantResult(d, test.want)
				t.finish(busy[1:])
				if !t.client.can().batch { // only a callback says what a gateway can do
					t.Error("the client sends no batches any more")
				}
			})
		})
	}
}

func TestGatewayClientBoundsItsBatches(t *testing.T) {
	testPosts(t, func(t *postTest) {
		busy := t.beBusy()
		var first []string
		for i := range maxBatchSends + 1 {
			token := fmt.Sprint("t", i)
			first = append(first, token)
			t.send(token)
		}
		large := event{Data: strings.Repeat("x", maxBatchBytes/2)}
		t.send("c", large)
		t.send("d", large)
		t.reply(busy[0], 200, "")
		t.reply(t.next(batch(first[:maxBatchSends]...)), 200, strings.Repeat(batchOK+"\n", maxBatchSends))
		body := `{"token":"%s","event":{"data":"` + large.Data + `"}}`
		rest := fmt.Sprintf("application/x-ndjson {\"token\":%q}\n"+body+"\n", first[maxBatchSends], "c")
		t.reply(t.next(rest), 200, batchOK+"\n"+batchOK)
		t.reply(t.next("application/json "+fmt.Sprintf(body, "d")), 200, "")
		t.finish(busy[1:])
		t.wantNone()
	})
}

func TestParseFeatures(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]features{
		"":                            {},
		" ":                           {},
		"batch":                       {known: true, batch: true},
		"a, batch ,retry":             {known: true, batch: true, retry: true},
		"batches":                     {known: true},
		"a;batch":                     {known: true},
		"batch, id, retry, heartbeat": {known: true, batch: true, retry: true},
	} {
		if got := parseFeatures(header); got != want {
			t.Errorf("%q: got %+v, want %+v", header, got, want)
		}
	}
}

// A gateway of another make may refuse a field that it does not know.
func TestGatewayClientRetryIsAFeature(t *testing.T) {
	t.Parallel()
	g := newGatewayTest(t)
	for features, want := range map[string]*regexp.Regexp{
		"":             regexp.MustCompile(`"name":"connection_close"},"close":true}$`),
		"batch":        regexp.MustCompile(`"name":"connection_close"},"close":true}$`),
		"batch, retry": regexp.MustCompile(`"name":"connection_close","retry":[12]\d{4}},"close":true}$`),
	} {
		g.heard(parseFeatures(features))
		r := g.send("t", []event{closeEvent("replaced")}, true)
		if got := g.got[len(g.got)-1]; r.err != nil || !want.MatchString(got) {
			t.Errorf("%q: got %v, %s, want %s", features, r.err, got, want)
		}
	}
}

// Clients that come back after a 410 must not do so at once, or all together.
func TestCloseEventRetry(t *testing.T) {
	t.Parallel()
	seen := map[int]bool{}
	for range 1000 {
		retry := closeEvent("task_completed").Retry
		if retry < 10_000 || retry > 20_000 {
			t.Fatalf("got retry %d, want 10,000 to 20,000", retry)
		}
		seen[retry] = true
	}
	if len(seen) < 100 {
		t.Errorf("got only %d different values in 1,000", len(seen))
	}
}
