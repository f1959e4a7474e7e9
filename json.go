package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"iter"
	"mime"
	"net/http"
	"strings"
	"unicode/utf8"
)

// JSON over HTTP for both roles. Bodies are read more strictly than
// encoding/json does by itself: names are exact, a name stands once, null is
// not absence, the text is UTF-8, and nothing follows the value.

var (
	errBodyTooLarge = errors.New("request body too large")
	errMediaType    = errors.New("content type must be application/json")
	errNotJSON      = errors.New("body must be one JSON object")
	errFieldType    = errors.New("a field has the wrong type")
	errDuplicate    = errors.New("a field stands twice")
)

// readBody reads at most limit bytes of the request's body into buf.
func readBody(w http.ResponseWriter, r *http.Request, limit int64, buf *bytes.Buffer) ([]byte, error) {
	_, err := buf.ReadFrom(http.MaxBytesReader(w, r.Body, limit))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, errBodyTooLarge
	}
	if err != nil {
		return nil, errNotJSON // the client broke off, or its chunks are malformed
	}
	return buf.Bytes(), nil
}

// isJSON reports whether the request says that its body is JSON.
func isJSON(r *http.Request) bool {
	value := r.Header.Get("Content-Type")
	if value == "application/json" {
		return true
	}
	mediaType, _, err := mime.ParseMediaType(value)
	return err == nil && mediaType == "application/json"
}

// readJSON reads a body of at most limit bytes as one JSON object. A request
// without a Content-Type is taken at its word; a wrong one is refused, which
// also keeps out what a form of another site can post.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64) (object, error) {
	if r.Header.Get("Content-Type") != "" && !isJSON(r) {
		return nil, errMediaType
	}
	var buf bytes.Buffer
	body, err := readBody(w, r, limit, &buf)
	if err != nil {
		return nil, err
	}
	return parseObject(body)
}

// object is the members of a JSON object, their values still encoded.
type object map[string]json.RawMessage

func parseObject(text []byte) (object, error) {
	if !isObject(text) {
		return nil, errNotJSON
	}
	o := object{}
	for name, value := range members(text) {
		if _, ok := o[name]; ok {
			return nil, errDuplicate
		}
		o[name] = value
	}
	return o, nil
}

// str returns a string member; absent is "" and false.
func (o object) str(name string) (value string, ok bool, err error) {
	raw, ok := o[name]
	if !ok {
		return "", false, nil
	}
	value, err = parseString(raw)
	return value, err == nil, err
}

// isObject reports whether text is one valid JSON object in UTF-8.
func isObject(text []byte) bool {
	trimmed := bytes.TrimLeft(text, " \t\r\n")
	return len(trimmed) > 0 && trimmed[0] == '{' && utf8.Valid(text) && json.Valid(text)
}

// members walks the members of an object for which isObject holds, in their
// order and with duplicates. It relies on the text being valid.
func members(text []byte) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		i := bytes.IndexByte(text, '{') + 1
		for {
			i = skipTo(text, i, '"', '}')
			if text[i] == '}' {
				return
			}
			end := valueEnd(text, i)
			name, _ := parseString(text[i:end])
			i = skipTo(text, end, ':', ':') + 1
			for text[i] == ' ' || text[i] == '\t' || text[i] == '\r' || text[i] == '\n' {
				i++
			}
			end = valueEnd(text, i)
			if !yield(name, text[i:end]) {
				return
			}
			i = end
		}
	}
}

// field is a member that pick looks for, and where its value goes.
type field struct {
	name  string
	value *[]byte
}

// pick finds the wanted members of an object for which isObject holds. It
// leaves the value of an absent one as it is.
func pick(text []byte, wanted ...field) error {
	for name, value := range members(text) {
		for _, f := range wanted {
			if f.name != name {
				continue
			}
			if *f.value != nil {
				return errDuplicate
			}
			*f.value = value
		}
	}
	return nil
}

// skipTo returns the index of the first a or b at or after i.
func skipTo(text []byte, i int, a, b byte) int {
	for text[i] != a && text[i] != b {
		i++
	}
	return i
}

// valueEnd returns the index behind the JSON value that begins at i.
func valueEnd(text []byte, i int) int {
	depth := 0
	for {
		switch text[i] {
		case '"':
			for i++; text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return i // the end of the object around a number or literal
			}
			depth--
		case ',', ' ', '\t', '\r', '\n':
			if depth == 0 {
				return i
			}
		}
		i++
		if depth == 0 && (text[i-1] == '"' || text[i-1] == '}' || text[i-1] == ']') {
			return i
		}
	}
}

// parseString decodes a JSON string; any other value is errFieldType. Quotes
// and backslashes, which are all that JSON inside a string usually needs, are
// decoded here, as encoding/json takes several times as long.
func parseString(raw []byte) (string, error) {
	if len(raw) == 0 || raw[0] != '"' {
		return "", errFieldType
	}
	inner := raw[1 : len(raw)-1]
	i := bytes.IndexByte(inner, '\\')
	if i < 0 {
		return string(inner), nil
	}
	var b strings.Builder
	b.Grow(len(inner))
	for ; i >= 0; i = bytes.IndexByte(inner, '\\') {
		c := inner[i+1]
		if c != '"' && c != '\\' {
			var s string
			if err := json.Unmarshal(raw, &s); err != nil {
				return "", errFieldType
			}
			return s, nil
		}
		b.Write(inner[:i])
		b.WriteByte(c)
		inner = inner[i+2:]
	}
	b.Write(inner)
	return b.String(), nil
}

// parseNumber decodes a JSON number; any other value is errFieldType.
func parseNumber(raw []byte) (n float64, err error) {
	if len(raw) == 0 || raw[0] != '-' && (raw[0] < '0' || raw[0] > '9') || json.Unmarshal(raw, &n) != nil {
		return 0, errFieldType
	}
	return n, nil
}

// marshal encodes a value of our own types, which cannot fail. HTML is not
// escaped: no JSON of ours is ever part of a page.
func marshal(v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(err) // a type of ours that JSON has no form for
	}
	return bytes.TrimRight(b.Bytes(), "\n")
}

// appendString appends a JSON string. Bytes that are not UTF-8 become U+FFFD.
func appendString(b []byte, s string) []byte {
	start, done := len(b), 0
	b = append(b, '"')
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ' || c >= utf8.RuneSelf:
			return append(b[:start], marshal(s)...)
		case c == '"' || c == '\\':
			b = append(b, s[done:i]...)
			b = append(b, '\\')
			done = i
		}
	}
	b = append(b, s[done:]...)
	return append(b, '"')
}

// writeJSON answers with a JSON body.
func writeJSON(w http.ResponseWriter, status int, v any) {
	body := append(marshal(v), '\n')
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(body)
}

// writeError answers {"error":"…"} with a fixed text.
func writeError(w http.ResponseWriter, status int, text string) {
	writeJSON(w, status, map[string]string{"error": text})
}

// writeBodyError answers an error of readBody or readJSON.
func writeBodyError(w http.ResponseWriter, err error) {
	switch err {
	case errBodyTooLarge:
		writeError(w, http.StatusRequestEntityTooLarge, err.Error())
	case errMediaType:
		writeError(w, http.StatusUnsupportedMediaType, err.Error())
	default:
		writeError(w, http.StatusBadRequest, err.Error())
	}
}
