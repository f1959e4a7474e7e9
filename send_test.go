package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestSendAnswers(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	c := g.open("/x")
	const (
		invalid  = `400 {"error":"body must be one JSON object"}`
		badType  = `400 {"error":"a field has the wrong type"}`
		twice    = `400 {"error":"a field is given twice"}`
		noToken  = `400 {"error":"token is missing or empty"}`
		noData   = `400 {"error":"event data is missing"}`
		badField = `400 {"error":"event name and id must not contain CR, LF or NUL"}`
		badRetry = `400 {"error":"event retry must be a whole number of milliseconds from 1 to 86400000"}`
	)
	for _, tt := range []struct {
		body string // with $ for the token
		want string
		wire string // what the client reads
	}{
		{`{"token":"$","event":{"data":"a"}}`, sentOK, "data: a"},
		{`{"token":"$","event":{"id":"k-1","name":"n","data":"a\nb\r\nc\rd"},"close":false}`, sentOK,
			"event: n\ndata: a\ndata: b\ndata: c\ndata: d\nid: k-1"},
		{`{"token":"$","event":{"id":"","name":"","data":""}}`, sentOK, "data: "},
		{` { "close" : false , "event" : { "data" : "\u00e9\u0000" } , "token" : "$" } `, sentOK, "data: é\x00"},
		{`{"token":"$","event":{"data":"a","other":1},"more":{"token":1}}`, sentOK, "data: a"},
		{`{"token":"$","event":{"data":"a","retry":1}}`, sentOK, "retry: 1\ndata: a"},
		{`{"token":"$","event":{"retry":86400000,"id":"1","name":"n","data":"a"}}`, sentOK, "retry: 86400000\nevent: n\ndata: a\nid: 1"},
		{`{"token":"$","event":{"data":"a","retry":1.5e3}}`, sentOK, "retry: 1500\ndata: a"},
		{`{"token":"$","Event":{"data":"a"},"CLOSE":true}`, sentOK, ""}, // names are exact, so this asks no more than the next

		// Is the stream alive? Nothing is written.
		{`{"token":"$"}`, sentOK, ""},
		{`{"token":"$","close":false}`, sentOK, ""},

		{``, invalid, ""}, {`null`, invalid, ""}, {`[]`, invalid, ""}, {`"$"`, invalid, ""}, {`{"token":"$"`, invalid, ""},
		{`{"token":"$"}{"token":"$"}`, invalid, ""}, {`{"token":"$"} x`, invalid, ""}, {"{\"token\":\"$\",\"x\":\"\xff\"}", invalid, ""},
		{`{}`, noToken, ""}, {`{"token":""}`, noToken, ""}, {`{"Token":"$"}`, noToken, ""}, {`{"event":{"data":"a"}}`, noToken, ""},
		{`{"token":null}`, badType, ""}, {`{"token":1}`, badType, ""}, {`{"token":["$"]}`, badType, ""},
		{`{"token":"$","event":null}`, badType, ""}, {`{"token":"$","event":"a"}`, badType, ""},
		{`{"token":"$","event":[]}`, badType, ""}, {`{"token":"$","event":true}`, badType, ""},
		{`{"token":"$","event":{"data":null}}`, badType, ""}, {`{"token":"$","event":{"data":{}}}`, badType, ""},
		{`{"token":"$","event":{"data":"a","id":1}}`, badType, ""}, {`{"token":"$","event":{"data":"a","name":null}}`, badType, ""},
		{`{"token":"$","event":{"data":"a","retry":null}}`, badType, ""}, {`{"token":"$","event":{"data":"a","retry":"1"}}`, badType, ""},
		{`{"token":"$","event":{"data":"a","retry":0}}`, badRetry, ""}, {`{"token":"$","event":{"data":"a","retry":1.5}}`, badRetry, ""},
		{`{"token":"$","event":{"data":"a","retry":-1}}`, badRetry, ""}, {`{"token":"$","event":{"data":"a","retry":86400001}}`, badRetry, ""},
		{`{"token":"$","event":{"retry":1}}`, noData, ""}, {`{"token":"$","event":{"data":"a","retry":1,"retry":1}}`, twice, ""},
		{`{"token":"$","close":null}`, badType, ""}, {`{"token":"$","close":0}`, badType, ""},
		{`{"token":"$","close":"true"}`, badType, ""}, {`{"token":"$","event":{"data":"a"},"close":{}}`, badType, ""},
		{`{"token":"$","event":{}}`, noData, ""}, {`{"token":"$","event":{"Data":"a"}}`, noData, ""},
		{`{"token":"$","event":{"id":"1","name":"n"}}`, noData, ""},
		{`{"token":"$","event":{"data":"a","id":"1\n"}}`, badField, ""}, {`{"token":"$","event":{"data":"a","name":"\r"}}`, badField, ""},
		{`{"token":"$","event":{"data":"a","id":"\u0000"}}`, badField, ""},
		{`{"token":"$","event":{"data":"a","name":"n\ndata: b"}}`, badField, ""},
		{`{"token":"$","token":"$"}`, twice, ""}, {`{"token":"$","event":{"data":"a","data":"b"}}`, twice, ""},

		{`{"token":"00000000-0000-4000-8000-000000000000"}`, sentGone, ""},
		{`{"token":"?","event":{"data":"a"},"close":true}`, sentGone, ""},
		{`{"token":"$ "}`, sentGone, ""},

		{`{"token":"$","x":"` + strings.Repeat("x", 1<<20) + `"}`, `413 {"error":"request body too large","code":"too_large"}`, ""},
	} {
		if got := g.post("application/json", strings.ReplaceAll(tt.body, "$", c.callback.Token)); got != tt.want {
			t.Errorf("%.100s: got %s, want %s", tt.body, got, tt.want)
		}
		if tt.wire != "" {
			if got := c.event(); got != tt.wire {
				t.Errorf("%.100s: the client got %q, want %q", tt.body, got, tt.wire)
			}
		}
	}
	for contentType, want := range map[string]string{
		"application/json;charset=UTF-8":    sentOK,
		"Application/JSON":                  sentOK,
		"":                                  `415 {"error":"content type must be application/json","code":"media_type"}`,
		"text/plain":                        `415 {"error":"content type must be application/json","code":"media_type"}`,
		"application/x-www-form-urlencoded": `415 {"error":"content type must be application/json","code":"media_type"}`,
	} {
		if got := g.post(contentType, `{"token":"`+c.callback.Token+`"}`); got != want {
			t.Errorf("Content-Type %q: got %s, want %s", contentType, got, want)
		}
	}
	// The last event comes before the end; then the stream is gone, before the client has done anything.
	last := g.post("application/json", `{"close":true,"event":{"data":"last"},"token":"`+c.callback.Token+`"}`)
	if probe := g.probe(c.callback.Token); last != sentOK || probe != sentGone {
		t.Errorf("event and close: got %s, then %s; want %s, then %s", last, probe, sentOK, sentGone)
	}
	c.wantData("last")
	c.wantEnd()
}

func TestSendWhileConnecting(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "", holding("connect", gate, answering(200, `{"event":{"data":"first"}}`)))
	c := g.get("/x")
	token := receive(t, g.connects).Token
	if got := g.send(token, "last"); got != sentBuffered {
		t.Errorf("send: got %s, want %s", got, sentBuffered)
	}
	if got := g.end(token); got != sentBuffered {
		t.Errorf("close: got %s, want %s", got, sentBuffered)
	}
	if got := g.send(token, "too late"); got != sentGone {
		t.Errorf("send behind the close: got %s, want %s", got, sentGone)
	}
	close(gate)
	c.begin()
	c.wantData("first", "last")
	c.wantEnd()
}

// Whatever comes in, it is the sender's fault, and the stream that it may mean goes on.
func TestMalformedBodies(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	c := g.open("/x")
	valid := []byte(`{"token":"` + c.callback.Token + `","event":{"id":"1","name":"n","data":"\u00e9\n"},"close":true}`)
	random := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		body := slices.Clone(valid)
		for json.Valid(body) {
			switch at := random.IntN(len(body)); random.IntN(4) {
			case 0:
				body = body[:at]
			case 1:
				body[at] = byte(random.Uint32())
			case 2:
				body = slices.Delete(body, at, at+1)
			case 3:
				body = slices.Insert(body, at, `{}[]",:\`[random.IntN(8)])
			}
		}
		if got := g.post("application/json", string(body)); !strings.HasPrefix(got, `4`) {
			t.Errorf("%q: got %s, want a status 4xx", body, got)
		}
	}
	g.send(c.callback.Token, "live")
	c.wantData("live")
}

// The gateway serves a connection that has brought one send by code of its own. Nobody must see where that code knows
// no further and gives the connection back to net/http, so every request is answered as on a fresh connection.
func TestSendConnection(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	body := `{"token":"` + g.open("/x").callback.Token + `"}`
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	const post, jsonType = "POST /internal/send HTTP/1.1\r\nHost: h\r\n", "Content-Type: application/json\r\n"
	plain := post + jsonType + length + "\r\n" + body
	for _, request := range []string{
		plain,
		post + strings.ToLower(jsonType+length) + "\r\n" + body,
		post + "content-LENGTH:" + strconv.Itoa(len(body)) + "\t\r\nCONTENT-type:\tApplication/Json \t;charset=utf-8\r\n\r\n" + body,
		post + jsonType + length + "Connection: Keep-Alive\r\nUser-Agent: a:b\r\nX-Empty:\r\n\r\n" + body,
		post + jsonType + length + "Connection: close\r\n\r\n" + body,
		post + jsonType + length + "Expect: 100-continue\r\n\r\n" + body,
		post + jsonType + length + length + "\r\n" + body,
		post + jsonType + length + "Content-Length: 1\r\n\r\n" + body,
		post + jsonType + "Content-Length: -1\r\n\r\n" + body,
		post + jsonType + "Content-Length: 0\r\n\r\n",
		post + jsonType + "Content-Length: 99999999999999999999\r\n\r\n",
		post + jsonType + "Content-Length : 1\r\n\r\n" + body,
		post + jsonType + "\r\n",
		post + jsonType + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body),
		post + jsonType + "Transfer-Encoding: chunked\r\n\r\nz\r\n",
		post + jsonType + " folded: x\r\n" + length + "\r\n" + body,
		post + jsonType + length + "no colon\r\n\r\n" + body,
		post + jsonType + length + "X: " + strings.Repeat("x", 32<<10) + "\r\n\r\n" + body,
		post + length + "\r\n" + body,
		post + "Content-Type: text/plain\r\n" + length + "\r\n" + body,
		post + "Content-Type: application/x-ndjson\r\n" + length + "\r\n" + body,
		post + jsonType + "Content-Length: 1048577\r\n\r\n" + strings.Repeat(" ", 1<<20+1),
		post + jsonType + "Content-Type: text/plain\r\n" + length + "\r\n" + body,
		post + "Content-Type: text/plain\r\n" + jsonType + length + "\r\n" + body,
		post + "Content-Type: application/json;;\r\n" + length + "\r\n" + body,
		post + "Content-Type: application/json; a=b; a=c\r\n" + length + "\r\n" + body,
		post + "Content-Type: Application/X-NDJSON; a=b\r\n" + length + "\r\n" + body,
		post + jsonType + length + "Host: h\r\n\r\n" + body,
		post + jsonType + length + ": x\r\n\r\n" + body,
		post + jsonType + length + "a(b: x\r\n\r\n" + body,
		post + jsonType + length + "User-Agent: a\x00b\r\n\r\n" + body,
		post + jsonType + length + "User-Agent: a\rb\r\n\r\n" + body,
		strings.Replace(plain, "Host: h\r\n", "", 1),
		strings.Replace(plain, "Host: h\r\n", "Host: a b\r\n", 1),
		strings.Replace(plain, "Host: h\r\n", "Host: [::1]:80\r\n", 1),
		strings.ReplaceAll(plain, "\r\n", "\n"),
		strings.Replace(plain, "HTTP/1.1", "HTTP/1.0", 1),
		strings.Replace(plain, "/internal/send", "/internal/send?x=1", 1),
		strings.Replace(plain, "/internal/send", "http://h/internal/send", 1),
		strings.Replace(plain, "POST", "PUT", 1),
		strings.Replace(plain, "POST", "post", 1),
		"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx",
		"GET /a%zz HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST\r\n\r\n",
	} {
		fresh, used := g.dial(request), g.dial(plain)
		if got := used.reply(); got != sentOK {
			t.Fatalf("got %s, want %s", got, sentOK)
		}
		used.write(request)
		want, got := fresh.answer(), used.answer()
		wantText, _ := fresh.rest()
		gotText, _ := used.rest()
		gotType, wantType := got.Header.Get("Content-Type"), want.Header.Get("Content-Type")
		if got := got.Header.Get("Cache-Control"); wantType == "application/json" && got != "no-store" {
			t.Errorf("%.300q: got Cache-Control %q, want no-store", request, got)
		}
		if got.StatusCode != want.StatusCode || gotType != wantType || gotText != wantText || got.Close != want.Close {
			t.Errorf("%.300q: got %s %s %q, to be closed: %v; want %s %s %q, %v",
				request, got.Status, gotType, gotText, got.Close, want.Status, wantType, wantText, want.Close)
		}
	}
}

// A request has its time from its first byte on, as with net/http, however it drips; a silent connection has longer.
func TestSendConnectionTimes(t *testing.T) {
	t.Parallel()
	const pause = 9 * time.Second
	plain := sendText("application/json", []byte(`{"token":"x"}`))
	for _, tt := range []struct {
		name  string
		begun string // of the next request, with the one before
		next  string // of it, a byte each pause
		least time.Duration
		most  time.Duration
	}{
		{"silent", "", "", sendIdle - sendIdleSlack, sendIdle},
		{"dripping", "", plain, pause + sendDue, pause + sendDue},
		{"begun, then dripping", plain[:60], plain[60:], sendDue, sendDue},
		{"begun, then silent", plain[:60], "", sendDue, sendDue},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := newGateway(gatewayConfig{}, slog.New(slog.DiscardHandler), newGatewayMetrics(newRegistry("test")))
			ours, theirs := net.Pipe()
			go g.sendLoop(ours, nil)
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
			time.Sleep(sendIdle - sendIdleSlack - time.Second)
			io.WriteString(theirs, plain[:60])
			time.Sleep(sendDue - time.Second)
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

// Requests need not come one at a time, nor whole; and a stream may follow them.
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
	conn.callback = receive(t, g.connects)
	conn.begin()
	g.send(conn.callback.Token, "live")
	conn.wantData("live")
}

func TestBatch(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	g := newGatewayFixture(t, "", func(w http.ResponseWriter, c callbackCall) {
		if c.Request.URL == "/held" {
			c.await(gate)
		}
	})
	open, ended, held := g.open("/x"), g.open("/x"), g.get("/held")
	held.callback = receive(t, g.connects)
	lines := []struct{ body, want string }{
		{`{"token":"$open","event":{"data":"1"}}`, `{"status":"ok"}`},
		{`{"token":"$held","event":{"data":"a"}}`, `{"status":"buffered"}`},
		{`{"token":"$open","event":{"data":"2"},`, `{"status":400,"error":"body must be one JSON object"}`},
		{`{"token":"$open","event":{"id":"3"}}`, `{"status":400,"error":"event data is missing"}`},
		{`{"token":"unknown","event":{"data":"4"}}`, `{"status":404}`},
		{`{"token":"$ended","event":{"data":"last"},"close":true}` + "\r", `{"status":"ok"}`},
		{`{"token":"$ended"}`, `{"status":404}`},
		{`{"token":"$open","event":{"data":"` + strings.Repeat("x", 1<<20) + `"}}`, `{"status":413}`},
		{"\t {\"token\":\"$open\",\"event\":{\"data\":\"5\"}} ", `{"status":"ok"}`},
		{"\u00a0{\"token\":\"$open\"}", `{"status":400,"error":"body must be one JSON object"}`},
		{`{"token":"$open"}`, `{"status":"ok"}`},
	}
	var bodies, want []string
	for _, line := range lines {
		bodies, want = append(bodies, line.body), append(want, line.want)
	}
	tokens := strings.NewReplacer("$open", open.callback.Token, "$ended", ended.callback.Token, "$held", held.callback.Token)
	batch := tokens.Replace(strings.Join(bodies, "\n"))
	if got, want := g.post("application/x-ndjson", batch), "200 "+strings.Join(want, "\n"); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	close(gate)
	held.begin()
	held.wantData("a")
	open.wantData("1", "5")
	ended.wantData("last")
	ended.wantEnd()
	if got, want := g.post("application/x-ndjson", ""), "200 "; got != want {
		t.Errorf("an empty batch: got %s, want %s", got, want)
	}
	if got, want := g.post("application/x-ndjson", strings.Repeat("\n", 4<<20+1)), `413 {"error":"request body too large","code":"too_large"}`; got != want {
		t.Errorf("a batch of more than 4 MiB: got %s, want %s", got, want)
	}
}

// Events in a row for one stream are one write, which is one chunk, unless they are large.
func TestBatchWritesARowAtOnce(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "", nil)
	a, b := g.open("/a"), g.open("/b")
	large := strings.Repeat("x", maxBurst/8)
	line := func(c *streamClient, data string) string {
		return string(appendSend(nil, c.callback.Token, &event{Data: data}, data == "end")) + "\n"
	}
	batch := line(a, "1") + line(a, "2") + line(b, "other") + line(a, "3") + "{}\n" + line(a, "4") + line(a, "5") +
		strings.Repeat(line(a, large), 5) + line(a, "end") + line(a, "late")
	ok, bad := `{"status":"ok"}`, `{"status":400,"error":"token is missing or empty"}`
	want := strings.Join([]string{"200 " + ok, ok, ok, ok, bad, ok, ok, ok, ok, ok, ok, ok, ok, `{"status":404}`}, "\n")
	if got := g.post("application/x-ndjson", batch); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	wire := ""
	for _, row := range [][]string{{"1", "2"}, {"3"}, {"4", "5", large, large, large, large}, {large}, {"end"}} {
		var chunk []byte
		for _, data := range row {
			chunk = appendEvent(chunk, sentEvent{data: []byte(data)})
		}
		wire += fmt.Sprintf("%x\r\n%s\r\n", len(chunk), chunk)
	}
	a.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(a.wire); string(got) != wire+lastChunk || err != nil {
		t.Errorf("got %.300q, %v, want %.300q", got, err, wire+lastChunk)
	}
	b.wantData("other")
	g.waitMetric(`gateway_events_total{status="written"}`, 12)
	g.waitMetric(`gateway_events_total{status="unknown_token"}`, 1)
}

// The events of a row are taken or refused as one, so none of a refused row may be on its way.
func TestBatchRefusesWholeRows(t *testing.T) {
	t.Parallel()
	g := newGatewayFixture(t, "STREAM_BUFFER_BYTES=4096", nil)
	c := g.open("/x")
	batch := strings.Repeat(string(appendSend(nil, c.callback.Token, &event{Data: strings.Repeat("x", 200)}, false))+"\n", 300)
	taken := 0
	for answer := ""; !strings.Contains(answer, "404"); taken += strings.Count(answer, `"ok"`) {
		answer = g.post("application/x-ndjson", batch)
	}
	text, _ := c.rest()
	if got := strings.Count(text, "x\n\n"); got != taken {
		t.Errorf("the client got %d whole events, of which %d were taken", got, taken)
	}
}

// A head that claims much, and then nothing, must not take the memory for it.
func TestSendBufferGrowsWithTheRequest(t *testing.T) {
	for _, size := range []int{1, sendBuffer, 64<<10 + 1, sendBufferMax, sendBufferMax + 1, maxBatch + 200} {
		var sent, buf []byte
		for len(buf) < size {
			if buf = growBuffer(buf, size); len(buf) == cap(buf) {
				t.Fatalf("%d bytes of %d: no room for more", len(buf), size)
			}
			if most := max(sendBufferMax, 3*len(buf)); cap(buf) > most {
				t.Fatalf("%d bytes of %d: room for %d, want at most %d", len(buf), size, cap(buf), most)
			}
			more := bytes.Repeat([]byte{byte(len(sent) >> 10)}, min(cap(buf), size)-len(buf)) // as far as one read may go
			buf, sent = append(buf, more...), append(sent, more...)
		}
		if !bytes.Equal(buf, sent) {
			t.Errorf("%d bytes are not what was sent", size)
		}
	}
}

// What is taken is what encoding/json reads, and it is taken again when a client encodes it anew.
func FuzzSendBody(f *testing.F) {
	f.Add([]byte(`{"token":"a","event":{"id":"1","name":"n","data":"a\nb"},"close":true}`))
	f.Add([]byte(`{"token":"a"}`))
	f.Add([]byte(`{"token":null,"event":{"data":1,"data":2},"close":0}`))
	f.Add([]byte(` { "close" : false , "event" : { "data" : "\ud800" } , "token" : "\u0000" } `))
	g := newGateway(gatewayConfig{}, slog.New(slog.DiscardHandler), newGatewayMetrics(newRegistry("test")))
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest("POST", "/internal/send", bytes.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		g.serveSend(w, r)
		m, err := parseSend(bytes.Clone(body))
		wantStatus := http.StatusNotFound
		if err != nil {
			wantStatus = http.StatusBadRequest
		}
		if w.Code != wantStatus {
			t.Errorf("%q: got status %d, want %d after %v", body, w.Code, wantStatus, err)
		}
		if err != nil {
			return
		}
		o, err := slowObject(body)
		e, eventErr := slowObject(o["event"])
		if err != nil || m.event.data != nil && eventErr != nil {
			t.Skip() // a field that means nothing to us stands twice
		}
		text := func(o object, name string) (s string) { json.Unmarshal(o[name], &s); return s }
		wantToken, wantEnd := text(o, "token"), string(o["close"]) == "true"
		var want *event
		if o["event"] != nil {
			want = &event{ID: text(e, "id"), Name: text(e, "name"), Data: text(e, "data")}
		}
		for _, body := range [][]byte{body, appendSend(nil, wantToken, want, wantEnd)} {
			m, err := parseSend(bytes.Clone(body))
			var got *event
			if m.event.data != nil {
				got = &event{ID: string(m.event.id), Name: string(m.event.name), Data: string(m.event.data)}
			}
			if m.event.oneLine && bytes.ContainsAny(m.event.data, "\r\n") {
				t.Errorf("%q: the data %q are said to be one line", body, m.event.data)
			}
			if err != nil || string(m.token) != wantToken || m.end != wantEnd || !reflect.DeepEqual(got, want) {
				t.Errorf("%q: got %q, %+v, %v, %v; want %q, %+v, %v", body, m.token, got, m.end, err, wantToken, want, wantEnd)
			}
		}
	})
}
